"""GPUs: one task on each by locks of real processes, what becomes of a task that finds none, batches that fit."""

import logging
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from cellquilt.core import gpus
from cellquilt.core.errors import CellquiltError
from cellquilt.segment import cellpose, stardist
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No word about GPUs from outside, and none left behind."""
    for name in (gpus.GPUS, gpus.FALLBACK, gpus.VISIBLE, *gpus._JOBS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(gpus.LOCKS, str(tmp_path / "locks"))
    yield
    gpus.release_gpus()


# --- one task on each

TASK = """
import os, sys, time
from pathlib import Path
from cellquilt.core.gpus import pin_gpus
from cellquilt.core.log import setup_logging
setup_logging()
taken = pin_gpus(int(sys.argv[2]))
assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(taken)
marks = [Path(sys.argv[1]) / name for name in taken]
for mark in marks:
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails where another has this GPU
print(",".join(taken), flush=True)
child = os.fork() if sys.argv[3] == "hold" else None
time.sleep(float(sys.argv[4]))
for mark in marks:
    mark.unlink()
"""


def task(folder, count=1, kind="work", seconds=0.1, **environment):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", TASK, str(folder), str(count), kind, str(seconds)],
        env={**os.environ, gpus.GPUS: "2", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ends(process):
    out, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    return out.strip(), said


def test_never_two_tasks_on_one_gpu(tmp_path):
    ended = [ends(process) for process in [task(tmp_path / "marks") for _ in range(5)]]
    assert {out for out, _ in ended} == {"0", "1"}
    assert sum("waiting for 1 of the GPUs 0, 1" in said for _, said in ended) >= 1
    assert not list((tmp_path / "marks").iterdir())


def test_slots_are_among_the_devices_that_are_visible_already(tmp_path):
    given = {gpus.VISIBLE: "GPU-4f/x,7,-1,3"}  # CUDA reads no further than -1
    ended = [ends(process)[0] for process in [task(tmp_path / "marks7", **{gpus.VISIBLE: "7"})]]
    assert ended == ["7"]
    for _ in range(2):
        names = gpus_of(given | {gpus.GPUS: "4"}, count=9)
        assert names == ("GPU-4f/x", "7")
    assert gpus_of({gpus.VISIBLE: "5,6", gpus.GPUS: "1"}, count=2) == ("5",)
    assert gpus_of({gpus.VISIBLE: "", gpus.GPUS: "1"}) == ()


def gpus_of(environment, count=1):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        taken = gpus.pin_gpus(count)
        assert gpus.pin_gpus(5) == taken  # nothing more the second time
        if taken:
            assert os.environ[gpus.VISIBLE] == ",".join(taken)
            assert gpus.GPUS not in os.environ  # children use what this process has
        gpus.release_gpus()
        assert {name: os.environ[name] for name in environment} == environment
    return taken


def test_a_killed_holder_frees_its_gpu_even_with_a_child_alive(tmp_path):
    holder = task(tmp_path / "marks", 2, "hold", 60)
    try:
        assert holder.stdout.readline().strip() == "0,1"
        waiting = task(tmp_path / "other marks")
        assert "waiting for 1 of the GPUs 0, 1" in waiting.stderr.readline()
        holder.kill()
        assert ends(waiting)[0] == "0"
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_those_that_want_several_take_all_or_none(tmp_path):
    marks = tmp_path / "marks"
    ended = [ends(process)[0] for process in [task(marks, count, seconds=0.05) for count in (2, 1, 2, 5, 1)]]
    assert [len(names.split(",")) for names in ended] == [2, 1, 2, 2, 1]


def test_nothing_is_pinned_where_tasks_do_not_share(tmp_path):
    assert gpus.pin_gpus() == ()
    assert gpus.VISIBLE not in os.environ
    assert not (tmp_path / "locks").exists()


def test_where_locks_lie(monkeypatch, tmp_path):
    monkeypatch.delenv(gpus.LOCKS)
    own = gpus._lock_folder()
    assert own.name == f"cellquilt-gpus-{os.getuid()}"
    assert own.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("SLURM_JOB_ID", "12/3")
    assert gpus._lock_folder().name == f"cellquilt-gpus-{os.getuid()}-12_3"
    gpus._lock_folder().rmdir()
    monkeypatch.setenv(gpus.GPUS, "2")
    (tmp_path / "file").touch()
    monkeypatch.setenv(gpus.LOCKS, str(tmp_path / "file"))
    with pytest.raises(CellquiltError, match="cannot share out GPUs") as error:
        gpus.pin_gpus()
    assert (error.value.code, gpus.LOCKS in error.value.hint) == ("gpu-slots", True)
    monkeypatch.setenv(gpus.GPUS, "two")
    with pytest.raises(CellquiltError, match="CELLQUILT_GPUS is 'two'"):
        gpus.pin_gpus()


# --- where there is none


def test_auto_leaves_nothing_taken_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv(gpus.GPUS, "2")
    assert gpus.find_gpus(lambda: os.environ[gpus.VISIBLE] == "1", 2) is False
    assert (os.environ[gpus.GPUS], gpus.VISIBLE in os.environ) == ("2", False)
    assert gpus.find_gpus(lambda: os.environ[gpus.VISIBLE], 2) == "0,1"
    assert gpus.GPUS not in os.environ


class FakeTensor:
    def __init__(self, values, dtype=np.float32):
        self.values, self.dtype = values, dtype

    def to(self, _):
        return self

    def float(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.values


class FakeCuda:
    """Memory of a GPU that holds so many tiles at once; a tile takes as much as it is told to."""

    def __init__(self, there=True, holds=10**9, tile_bytes=100, free_bytes=10**9):
        self.there, self.holds, self.tile_bytes, self.free_bytes = there, holds, tile_bytes, free_bytes
        self.peak, self.emptied, self.batches = 0, 0, []

    def is_available(self):
        return self.there

    def empty_cache(self):
        self.emptied += 1

    def reset_peak_memory_stats(self, _):
        self.peak = 0

    def memory_allocated(self, _):
        return 7000

    def max_memory_allocated(self, _):
        return 7000 + self.peak

    def mem_get_info(self, _):
        return self.free_bytes, 2 * self.free_bytes


def fake_torch(cuda, built_with="12.8"):
    device = lambda name: types.SimpleNamespace(type=name)  # noqa: E731
    mps = types.SimpleNamespace(is_available=lambda: False)
    return types.SimpleNamespace(
        __version__="2.9.9",
        version=types.SimpleNamespace(cuda=built_with, hip=None),
        cuda=cuda,
        device=device,
        backends=types.SimpleNamespace(mps=mps),
        from_numpy=FakeTensor,
        inference_mode=lambda: types.SimpleNamespace(__enter__=None),
    )


def test_a_gpu_that_is_asked_for_and_not_there(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("cellquilt"), "propagate", True)
    none = fake_torch(FakeCuda(there=False), built_with=None)
    monkeypatch.setenv(gpus.GPUS, "1")
    with pytest.raises(CellquiltError) as error:
        cellpose._device(none, True)
    assert error.value.code == "gpu-missing"
    assert error.value.message == (
        "a GPU is asked for by --cellpose_gpu (gpu=True), and torch 2.9.9, built without CUDA, sees none "
        "(CUDA_VISIBLE_DEVICES is '0')"
    )
    assert error.value.hint.startswith("leave --cellpose_gpu out, or go on without: --gpu_fallback")
    assert os.environ[gpus.GPUS] == "1"  # nothing stays taken
    assert cellpose._device(none, False).type == "cpu"
    monkeypatch.setenv(gpus.FALLBACK, "true")
    assert cellpose._device(none, True).type == "cpu"
    assert "sees none (CUDA_VISIBLE_DEVICES is '0'); running on the CPU" in caplog.text
    assert cellpose._device(fake_torch(FakeCuda()), True).type == "cuda"
    assert os.environ[gpus.VISIBLE] == "0"


def test_stardist_follows_the_same_rule(monkeypatch):
    seen = []
    config = types.SimpleNamespace(
        list_physical_devices=lambda _: [],
        threading=types.SimpleNamespace(
            set_intra_op_parallelism_threads=seen.append,
            set_inter_op_parallelism_threads=seen.append,
            get_intra_op_parallelism_threads=lambda: 3,
        ),
        set_visible_devices=lambda *given: seen.append(given),
        experimental=types.SimpleNamespace(enable_op_determinism=lambda: None),
    )
    test = types.SimpleNamespace(is_built_with_cuda=lambda: True)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(__version__="2.99", config=config, test=test))
    with pytest.raises(CellquiltError, match=r"--stardist_gpu .*TensorFlow 2\.99 sees none") as error:
        stardist._device(3, True)
    assert error.value.code == "gpu-missing"
    monkeypatch.setenv(gpus.FALLBACK, "true")
    assert stardist._device(3, True) == (3, "cpu")
    assert ([], "GPU") in seen


# --- batches that fit


class Full(RuntimeError):
    pass


@settings(deadline=None, max_examples=200)
@given(
    n_items=st.integers(0, 40),
    size=st.integers(1, 50),
    holds=st.lists(st.integers(0, 30), min_size=1),
    instead=st.booleans(),
    breaks_at=st.none() | st.integers(0, 39),
)
def test_every_item_once_and_in_order_whatever_fails(n_items, size, holds, instead, breaks_at):
    items, attempts, released, done = list(range(n_items)), [], [], []

    def run(batch):
        attempts.append(len(batch))
        if len(batch) > holds[len(attempts) % len(holds)]:  # other programs come and go
            raise Full("CUDA out of memory")
        if breaks_at in batch:
            raise RuntimeError("no kernel")
        return [(item, "gpu") for item in batch]

    def alone(batch):
        return [(item, "cpu") for item in batch]

    def all_of_them():
        for batch, result, left in gpus.in_batches(
            items, size, run, is_oom=lambda error: isinstance(error, Full), release=lambda: released.append(1),
            instead=alone if instead else None,
        ):  # fmt: skip
            assert [item for item, _ in result] == list(batch)
            assert 1 <= len(batch) <= size
            assert left <= size
            done.extend(result)

    problem = None
    try:
        all_of_them()
    except CellquiltError as error:
        problem = error.code
    except RuntimeError as error:
        problem = str(error)
    assert [item for item, _ in done] == items[: len(done)]
    if problem is None:
        assert len(done) == n_items
    elif problem == "gpu-out-of-memory":
        assert not instead
        assert attempts[-1] == 1
    else:
        assert problem == "no kernel"
        assert breaks_at is not None
        assert len(done) <= breaks_at
    if min(holds) >= min(size, n_items):
        assert not released


def test_what_a_failed_batch_allocated_is_gone_before_memory_is_emptied():
    import gc
    import weakref

    class Memory:
        pass

    alive = []
    at_release = []

    def run(batch):
        memory = Memory()
        alive.append(weakref.ref(memory))
        if len(batch) > 1:
            raise Full("out of memory")
        return batch

    gc.disable()
    try:
        found = list(
            gpus.in_batches([1, 2, 3], 3, run, release=lambda: at_release.append([ref() is None for ref in alive]))
        )
    finally:
        gc.enable()
    assert [batch for batch, _, _ in found] == [[1], [2], [3]]
    assert at_release == [[True]]  # 3 to 1 at once


def test_what_counts_as_out_of_memory():
    class OutOfMemoryError(RuntimeError):
        pass

    class ResourceExhaustedError(Exception):
        pass

    for error in (OutOfMemoryError(), ResourceExhaustedError("OOM when allocating tensor"),
                  RuntimeError("CUDA error: out of memory"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
                  RuntimeError("MPS backend out of memory")):  # fmt: skip
        assert gpus.out_of_memory(error)
    for error in (RuntimeError("no kernel"), ValueError("out of memory"), MemoryError()):
        assert not gpus.out_of_memory(error)


def test_how_many_items_fit():
    assert gpus.fitting_items(1000, 100, 4) == 24  # 60 % of 1000 in items of 25
    assert gpus.fitting_items(10**12, 100, 4) == 64
    assert gpus.fitting_items(0, 100, 4) == 1
    assert gpus.fitting_items(10, 0, 4) == 24


def segmenter(cuda, **engine):
    """A segmenter on a GPU that is not there; its network returns each tile's first number."""

    class Quiet:
        __enter__ = __exit__ = lambda *_: None

    torch = fake_torch(cuda)
    torch.inference_mode = Quiet
    made = cellpose.CellposeSegmenter.__new__(cellpose.CellposeSegmenter)
    made.engine, made.generation, made._torch, made.facts = engine, "3", torch, {}
    made.device, made.batch_size = torch.device("cuda"), engine.get("batch_size")
    made._net_on_cpu = None

    def on_gpu(tensor):
        n_tiles = len(tensor.values)
        cuda.batches.append(n_tiles)
        if n_tiles > cuda.holds:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        cuda.peak = max(cuda.peak, n_tiles * cuda.tile_bytes)
        return (FakeTensor(tensor.values.max((1, 2, 3))),)

    made.net = on_gpu
    made._network = lambda _: lambda tensor: (FakeTensor(-tensor.values.max((1, 2, 3))),)
    return made


def tiles(n_tiles):
    return {(0, k): np.full((2, 3, 3), k, np.float32) for k in range(n_tiles)}


def test_cellpose_measures_a_first_batch_and_fills_the_free_memory():
    cuda = FakeCuda(tile_bytes=100, free_bytes=5000)
    made = segmenter(cuda)
    inputs = tiles(70)
    assert made.run_tiles(inputs) == {(0, k): float(k) for k in range(70)}
    assert not inputs
    assert cuda.batches == [4, 30, 30, 6]  # 60 % of 5000 bytes
    assert made.facts["batch_size"] == 30
    made.run_tiles(tiles(31))
    assert cuda.batches[4:] == [30, 1]  # measured once


def test_a_given_batch_size_is_used_as_given():
    cuda = FakeCuda()
    assert len(segmenter(cuda, batch_size=16).run_tiles(tiles(40))) == 40
    assert cuda.batches == [16, 16, 8]


def test_cellpose_halves_what_does_not_fit():
    cuda = FakeCuda(holds=5)
    made = segmenter(cuda, batch_size=16)
    assert made.run_tiles(tiles(20)) == {(0, k): float(k) for k in range(20)}
    assert cuda.batches == [16, 8, 4, 4, 4, 4, 4]
    assert cuda.emptied == 2
    assert (made.batch_size, made.facts) == (4, {"batch_size": 4})
    tight = FakeCuda(holds=2)
    assert len(segmenter(tight).run_tiles(tiles(7))) == 7
    assert tight.batches == [4, 2, 2, 2, 1]  # what did not fit is not measured


def test_cellpose_where_not_one_tile_fits(monkeypatch):
    made = segmenter(FakeCuda(holds=0), batch_size=4)
    with pytest.raises(CellquiltError, match="too small for 1 tiles: CUDA out of memory") as error:
        made.run_tiles(tiles(3))
    assert error.value.code == "gpu-out-of-memory"
    monkeypatch.setenv(gpus.FALLBACK, "true")
    assert made.run_tiles(tiles(3)) == {(0, k): -float(k) for k in range(3)}  # the CPU's network
    assert made.facts == {"tiles_on_cpu": 3, "batch_size": 1}


def stardist_segmenter(holds_px, device="gpu", memory_mb=4000):
    class ResourceExhaustedError(Exception):
        pass

    class Model:
        tiles: list = []  # noqa: RUF012
        config = types.SimpleNamespace(n_rays=32)

        def predict_instances(self, image, *, axes, n_tiles, **_):
            self.tiles.append((axes, *n_tiles))
            if max(length / n for length, n in zip(image.shape[:2], n_tiles, strict=False)) > holds_px:
                raise ResourceExhaustedError("OOM when allocating tensor")
            return None, {"coord": np.zeros((1, 2, 32)), "prob": [0.9]}

    made = stardist.StarDistSegmenter.__new__(stardist.StarDistSegmenter)
    made.model, made.thresholds, made.memory_mb, made.facts = Model(), {}, memory_mb, {"device": device}
    made.description = types.SimpleNamespace(filters=32, reach=40)
    made.model.tiles = []
    return made


def test_stardist_takes_smaller_tiles_where_the_memory_is_full(monkeypatch):
    made = stardist_segmenter(holds_px=600)
    pixels = np.zeros((1, 1500, 1000), np.float32)
    outlines, confidence = made.outlines(pixels)
    assert (outlines.shape, confidence.tolist()) == ((1, 2, 32), [0.9])
    counts = [n_tiles[1] for n_tiles in made.model.tiles]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert 1500 / counts[-1] <= 600
    assert 1500 / counts[-2] > 600
    before = len(counts)
    made.outlines(pixels)
    assert len(made.model.tiles) == before + 1  # remembered
    full = stardist_segmenter(holds_px=100)
    with pytest.raises(CellquiltError, match="MB of tiles: OOM when allocating") as error:
        full.outlines(pixels)
    assert error.value.code == "gpu-out-of-memory"
    assert full.model.tiles[-1] == ("YX", 6, 4)  # of 256 pixels
    with pytest.raises(Exception, match=r"^OOM when allocating"):
        stardist_segmenter(holds_px=100, device="cpu").outlines(pixels)  # not the GPU's
