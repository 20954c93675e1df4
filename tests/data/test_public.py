"""Public data sets, from small stand-ins of the same layout."""

import hashlib
import pickle
import sys
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from vislora.compose import configure
from vislora.config.data import Cub200Data, HfData, TorchvisionData
from vislora.data import public
from vislora.data.load import load_splits
from vislora.data.quarantine import write_quarantine
from vislora.errors import DataError
from vislora.preflight import preflight

SPECIES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(path)


@pytest.fixture
def cub_archive(tmp_path):
    """The archive of CUB-200-2011 with three species of four pictures."""
    source = tmp_path / "source" / "CUB_200_2011"
    images, labels, split = [], [], []
    for k, species in enumerate(SPECIES):
        for i in range(4):
            number = 4 * k + i + 1
            name = f"{species}/{species[4:]}_{i:04d}.jpg"
            picture(source / "images" / name, 20 * number)
            images.append(f"{number} {name}")
            labels.append(f"{number} {k + 1}")
            split.append(f"{number} {int(i < 3)}")
    for name, lines in {
        "images.txt": images,
        "image_class_labels.txt": labels,
        "train_test_split.txt": split,
        "classes.txt": [f"{k + 1} {species}" for k, species in enumerate(SPECIES)],
    }.items():
        (source / name).write_text("\n".join(lines) + "\n")
    archive = tmp_path / "server" / "CUB_200_2011.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "CUB_200_2011")
    return archive


@pytest.fixture
def serve(monkeypatch):
    """Let the data set's address be a file's on a server of this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def point(archive, md5=None):
        handler = partial(_Silent, directory=archive.parent)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setattr(public, "CUB_URL", f"http://127.0.0.1:{servers[-1].server_port}/{archive.name}")
        monkeypatch.setattr(public, "CUB_MD5", md5 or hashlib.md5(archive.read_bytes()).hexdigest())

    yield point
    for server in servers:
        server.shutdown()
        server.server_close()


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_cub_is_fetched_checked_unpacked_and_split_by_its_own_lists(tmp_path, cub_archive, serve):
    serve(cub_archive)
    config = Cub200Data(root=str(tmp_path / "cub"))
    splits = load_splits(config, 0)
    assert splits.classes == ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")
    assert (len(splits.train), len(splits.test)) == (9, 3)
    assert abs(splits.test.image(1).getpixel((0, 0))[0] - 160) <= 2
    assert splits.test.labels == [0, 1, 2]
    cub_archive.unlink()
    assert load_splits(config, 0).classes == splits.classes  # nothing is fetched twice


def test_a_list_of_files_to_leave_out_is_relative_to_the_root_of_cub(tmp_path, cub_archive, serve):
    serve(cub_archive)
    root, listed = tmp_path / "cub", tmp_path / "quarantine.txt"
    first = load_splits(Cub200Data(root=str(root)), 0).train.names[0]
    write_quarantine({first: "as preflight writes it"}, root, listed)
    splits = load_splits(Cub200Data(root=str(root), quarantine=str(listed)), 0)
    assert first not in splits.train.names
    assert [(str(problem.file), problem.kinds) for problem in splits.problems] == [(first, ("quarantined",))]


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up <HTTPError:ResourceWarning")  # which torchvision leaves open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_or_unreachable_cub_archive_is_refused(tmp_path, cub_archive, serve):
    serve(cub_archive, md5="0" * 32)
    with pytest.raises(DataError, match="can't be downloaded"):
        load_splits(Cub200Data(root=str(tmp_path / "a")), 0)
    serve(cub_archive)
    cub_archive.unlink()
    with pytest.raises(DataError, match=r"put CUB_200_2011\.tgz from .* into"):
        load_splits(Cub200Data(root=str(tmp_path / "b")), 0)
    with pytest.raises(DataError, match="download=false"):
        load_splits(Cub200Data(root=str(tmp_path / "c"), download=False), 0)


def test_an_archive_put_there_by_hand_is_used_and_an_interrupted_unpacking_done_anew(tmp_path, cub_archive, serve):
    serve(cub_archive)
    root = tmp_path / "cub"
    half = root / "CUB_200_2011.part" / "CUB_200_2011"
    half.mkdir(parents=True)
    (half / "images.txt").write_text("1 gone.jpg\n")
    cub_archive.rename(root / cub_archive.name)
    assert len(load_splits(Cub200Data(root=str(root), download=False), 0).train) == 9
    assert sorted(path.name for path in root.iterdir()) == ["CUB_200_2011", "CUB_200_2011.tgz"]


def test_an_archive_that_reaches_out_of_its_folder_is_not_unpacked(tmp_path, serve):
    archive = tmp_path / "server" / "CUB_200_2011.tgz"
    archive.parent.mkdir()
    (tmp_path / "evil").write_text("evil")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "evil", "../../escaped")
    serve(archive)
    with pytest.raises(DataError, match="can't be unpacked"):
        load_splits(Cub200Data(root=str(tmp_path / "cub")), 0)
    assert not (tmp_path / "escaped").exists()


def test_cub_tables_that_do_not_fit_together_are_named(tmp_path, cub_archive, serve):
    serve(cub_archive)
    config = Cub200Data(root=str(tmp_path / "cub"))
    load_splits(config, 0)
    folder = tmp_path / "cub" / "CUB_200_2011"
    (folder / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(DataError, match="don't fit together at '2'"):
        load_splits(config, 0)
    (folder / "train_test_split.txt").write_text("1 1\n2\n")
    with pytest.raises(DataError, match=r"train_test_split\.txt has a line of one word; delete .*/CUB_200_2011 to"):
        load_splits(config, 0)
    (folder / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt is missing"):
        load_splits(config, 0)


def test_a_torchvision_set_in_binary_batches(tmp_path, monkeypatch):
    """CIFAR-10's own file layout, with the checksums of the small files in place of the real ones."""
    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [b"plane", b"car", b"bird"]

    def batch(name, count):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        with (folder / name).open("wb") as file:
            pickle.dump({"data": data, "labels": [i % 3 for i in range(count)]}, file)
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": [n.decode() for n in names]}, file)
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [batch("data_batch_1", 30)])
    monkeypatch.setattr(cifar, "test_list", [batch("test_batch", 6)])
    meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(cifar, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    splits = load_splits(TorchvisionData(name="CIFAR10", root=str(tmp_path), val_fraction=0.2), 0)
    assert splits.classes == ("plane", "car", "bird")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (24, 6, 6)
    assert splits.test.image(0).size == (32, 32)


def test_a_torchvision_set_in_folders_with_lists(tmp_path):
    """Oxford-IIIT Pet's own layout: images/ and annotations/{trainval,test}.txt."""
    root = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": [], "test": []}
    for k, name in enumerate(["Abyssinian", "beagle"]):
        for i in range(5):
            picture(root / "images" / f"{name}_{i}.jpg", 50 * k + i)
            lists["trainval" if i < 3 else "test"].append(f"{name}_{i} {k + 1} {k + 1} 1")
    (root / "annotations").mkdir()
    for name, lines in lists.items():
        (root / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "annotations" / "trimaps").mkdir()
    splits = load_splits(TorchvisionData(name="OxfordIIITPet", root=str(tmp_path), val_fraction=0.0), 0)
    assert splits.classes == ("Abyssinian", "Beagle")
    assert (len(splits.train), splits.val, len(splits.test)) == (6, None, 4)
    assert splits.train.labels == [0, 0, 0, 1, 1, 1]
    assert splits.test.image(3).mode == "RGB"
    (root / "images" / "beagle_4.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(DataError, match=r"beagle_4\.jpg can't be decoded: [^:]*; replace it$"):
        splits.test.image(3)
    looked = configure("preflight", ["recipe=vit_birds", "data=torchvision", "data.name=OxfordIIITPet"])
    looked.data.root = str(tmp_path)
    with pytest.raises(DataError, match=r"^\S*/beagle_4\.jpg can't be decoded: [^:]*; replace it$"):
        preflight(looked)


def test_sets_that_are_not_there_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"no classification set of torchvision; there are CIFAR10"):
        load_splits(TorchvisionData(name="CocoDetection"), 0)
    with pytest.raises(DataError, match=r"DTD is not complete in .* and can't be downloaded"):
        load_splits(TorchvisionData(name="DTD", root=str(tmp_path), download=False), 0)


def test_hub_sets_need_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it isn't installed
    with pytest.raises(DataError, match=r"the datasets package: pip install datasets"):
        load_splits(HfData(name="beans"), 0)
