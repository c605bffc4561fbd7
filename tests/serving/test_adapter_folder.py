"""Names are keys, never paths, and nothing outside of the folder is read."""

import pytest

from fastft.serving import UnknownAdapter
from fastft.serving.folder import AdapterFolder
from fastft.serving.requests import AdaptersUnavailable


def adapter(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def root(tmp_path):
    adapter(tmp_path / "outside")
    adapter(tmp_path / "root" / "one")
    return tmp_path / "root"


def refused(folder, name):
    assert name not in folder and name not in folder.names()
    with pytest.raises(UnknownAdapter):
        folder.path(name)


def test_what_lies_in_the_folder(root):
    adapter(root / "T-w_o2")
    (root / "empty").mkdir()
    (root / "file").write_text("")
    folder = AdapterFolder(root)
    assert folder.names() == ["T-w_o2", "one"] and "one" in folder
    assert folder.path("one") == root / "one"
    refused(folder, "empty")
    refused(folder, "file")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../outside",
        "one/../../outside",
        "/etc",
        "a/b",
        "a\\b",
        "one\n",
        "one\0",
        "öne",
        "one.",
        "x" * 65,
        "%2e%2e",
    ],
)
def test_what_is_no_name(root, name):
    with_dots = root / "one."
    adapter(with_dots)
    refused(AdapterFolder(root), name)
    # Nor is a path, absolute or not.
    refused(AdapterFolder(root), str(root / "one"))


def test_links_count_where_they_lead_to(root):
    (root / "alias").symlink_to(root / "one")
    (root / "out").symlink_to(root.parent / "outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "broken").symlink_to(root / "nothing")
    linked = adapter(root / "linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(root.parent / "outside" / "adapter_model.safetensors")
    # A folder beside the root whose path begins like the root's.
    sibling = adapter(root.parent / "root2" / "evil")
    (root / "sibling").symlink_to(sibling)
    folder = AdapterFolder(root)
    assert folder.names() == ["alias", "one"] and folder.path("alias") == root / "one"
    for name in ("out", "loop", "broken", "linked", "sibling"):
        refused(folder, name)


def test_the_root_itself_may_be_a_link(root):
    (root.parent / "link").symlink_to(root)
    assert AdapterFolder(root.parent / "link").names() == ["one"]


def test_the_root_may_become_a_link_and_lead_elsewhere(root):
    folder = AdapterFolder(root)
    root.rename(root.parent / "v1")
    root.symlink_to(root.parent / "v1")
    assert folder.names() == ["one"] and folder.path("one") == root.parent / "v1" / "one"
    adapter(root.parent / "v2" / "two")
    root.unlink()
    root.symlink_to(root.parent / "v2")
    assert folder.names() == ["two"] and "one" not in folder


def test_no_folder(root):
    assert AdapterFolder(None).names() == []
    refused(AdapterFolder(None), "one")
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        AdapterFolder(root / "nothing")


def test_a_folder_that_is_gone_for_a_while(root):
    folder = AdapterFolder(root)
    root.rename(root.parent / "away")
    for look in (folder.names, lambda: folder.path("one"), lambda: "one" in folder):
        with pytest.raises(AdaptersUnavailable, match="root' can't be read: No such file"):
            look()
    (root.parent / "away").rename(root)
    assert folder.names() == ["one"]
