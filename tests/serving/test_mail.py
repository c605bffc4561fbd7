"""From the engine's thread to the event loop: nothing is lost between two deliveries."""

import asyncio
from collections import deque

from fastft.serving.api.mail import Courier, Mailbox


def test_what_comes_when_all_was_taken_is_delivered_too():
    async def received():
        courier, mailbox, late = Courier(asyncio.get_running_loop()), Mailbox(), [2]

        class Items(deque):
            def __len__(self):
                length = super().__len__()
                if not length and late:  # the engine's thread, just as the loop has looked
                    courier.put(mailbox, late.pop())
                return length

        courier._items = Items()
        courier.put(mailbox, 1)
        items = await mailbox.take(20)
        return items if 2 in items else items + await mailbox.take(2)

    assert asyncio.run(received()) == [1, 2]


def test_an_empty_mailbox_waits():
    async def received():
        mailbox = Mailbox()
        mailbox.add(1)
        assert await mailbox.take(20) == [1]
        asyncio.get_running_loop().call_soon(mailbox.add, 2)
        return await mailbox.take(20), await mailbox.take(0.01)

    assert asyncio.run(received()) == ([2], [])
