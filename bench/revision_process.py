"""The process of another revision's fastft: builds the cases' arms, and times calls of them when it is asked to.

``python -m fastft.bench.revision_process FD`` in the revision's folder; FD is one end of a pipe (`revision.Base`).
"""

import sys
from multiprocessing.connection import Connection


class Arms:
    """The floor and fastft of a case, here."""

    def start(self, folder: str, settings: dict, seed: int, threads: int) -> None:
        import torch

        import fastft

        from . import run

        if not fastft.__file__.startswith(folder):
            raise RuntimeError(f"fastft is imported from {fastft.__file__}, not from {folder}")
        torch.set_num_threads(threads)
        self.device, self.seed = torch.device(settings["device"]), seed
        self.cases = {case.key(): case for case in run.listed(**settings)}

    def offer(self, key: tuple):
        from . import runner

        self.runs, self.position = {}, 0  # what the case before held is freed first
        _, self.runs, found = runner.prepare(self.cases[key], self.device, self.seed, arms=("fastft",))
        return found["floor2"], found["fastft"]

    def settle(self, graph: bool) -> None:
        from . import graphs

        if graph:
            pool = graphs.new_pool()
            self.runs = {name: [graphs.capture(run, pool) for run in arm] for name, arm in self.runs.items()}
        for arm in self.runs.values():
            for run in arm * 2:
                run()

    def sample(self, name: str, calls: int) -> float:
        """Seconds of so many calls, after one that is not timed."""
        from . import rounds

        def call(times):
            for _ in range(times):
                self.runs[name][self.position % len(self.runs[name])]()
                self.position += 1

        begin, end, seconds = rounds.clock(self.device)
        with rounds.without_garbage_collection():
            call(1)
            start = begin()
            call(calls)
            return seconds(start, end())


def main() -> int:
    arms = Arms()
    with Connection(int(sys.argv[1])) as parent:
        while True:
            try:
                question, *rest = parent.recv()
            except EOFError:  # the other side is done
                return 0
            try:
                answer = getattr(arms, question)(*rest), None
            except Exception as error:  # whatever another revision lacks or raises: the case is skipped with it
                answer = None, f"{type(error).__name__}: {error}"
            parent.send(answer)


if __name__ == "__main__":
    sys.exit(main())
