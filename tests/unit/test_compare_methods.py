"""`--compare` in one process: tables and cells of compared methods, what the report shows, and every wrong use."""

import hashlib
import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely
import spatialdata
from cellquilt.cli import main
from cellquilt.comparison.cells import Segmentation
from cellquilt.comparison.methods import compare, read_comparison
from cellquilt.comparison.stores import Source, compare_stores, default_names, method_of, methods_in
from cellquilt.core.assignment import ASSIGNMENT, Assignment
from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import iter_points
from cellquilt.core.settings import SETTINGS, Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store, as_converted, new_store
from cellquilt.report.methods import methods_context
from test_comparison import Page

RAINFALL = "cellquilt.segment.generic:rainfall"
FAKES = Path(__file__).resolve().parents[1] / "fakes"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder with a simulated Xenium bundle, `slide`, and a store of it whose cells are `generic`'s, `whole.zarr`."""
    import cellquilt as cq

    folder = tmp_path_factory.mktemp("compared")
    cq.simulate(folder / "sim", format="xenium", width_px=384, seed=3)
    (folder / "sim/slide_0").rename(folder / "slide")
    sdata = cq.io.xenium(folder / "slide", output=folder / "whole.zarr")
    cq.segmentation.generic(sdata, RAINFALL, diameter_um=8)
    cq.aggregate(sdata)
    return folder


@pytest.fixture(scope="module")
def with_vendor(made):
    """A copy with which `vendor` was compared, and the comparison."""
    import cellquilt as cq

    shutil.copytree(made / "whole.zarr", made / "compared.zarr")
    return made / "compared.zarr", cq.compare(spatialdata.read_zarr(made / "compared.zarr"), ["vendor"])


@pytest.fixture
def store(made, tmp_path) -> Path:
    shutil.copytree(made / "whole.zarr", tmp_path / "slide.zarr")
    return tmp_path / "slide.zarr"


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def tree_checksum(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counted_in(store: Path, element: str) -> np.ndarray:
    """Counted transcripts of each cell, by what the element says of the points."""
    points, said = Store(store).element("points", "transcripts"), Assignment(Store(store).element("shapes", element))
    total = np.zeros(len(read_shapes(Store(store).element("shapes", element))), dtype=np.int64)
    for batch in iter_points(points, ["transcript_id", "is_control", "passes_qv"]):
        cell = said.next(batch.column("transcript_id").to_numpy())
        good = batch.column("passes_qv").to_numpy() & ~batch.column("is_control").to_numpy() & (cell >= 0)
        total += np.bincount(cell[good], minlength=total.size)
    said.finish()
    return total


@pytest.mark.slow
def test_compared_methods_stand_beside_the_chosen_one(made, store, monkeypatch):
    """An image's, the machine's, and a chain's by the stand-in for Baysor: each table adds up to its own assignment."""
    import cellquilt as cq

    monkeypatch.setenv("PATH", str(FAKES), prepend=":")
    before = {name: tree_checksum(store / name) for name in ("points", "tables/table", "shapes/cell_boundaries")}
    sdata = spatialdata.read_zarr(store)
    table = cq.compare(sdata, methods="vendor,vendor+baysor", truth=made / "slide/truth")
    assert table.methods == ("generic", "vendor", "vendor+baysor")
    assert before == {name: tree_checksum(store / name) for name in before}

    published = spatialdata.read_zarr(store)
    assert sorted(published.tables) == ["table", "table_vendor", "table_vendor_baysor"]
    assert published.tables["table"].uns["spatialdata_attrs"]["region"] == "cell_boundaries"
    for method in ("vendor", "vendor_baysor"):
        own, cells = published.tables[f"table_{method}"], published.shapes[f"{method}_boundaries"]
        assert own.uns["spatialdata_attrs"]["region"] == f"{method}_boundaries"
        assert own.obs_names.tolist() == cells.index.tolist() == sdata.tables[f"table_{method}"].obs_names.tolist()
        sums = counted_in(store, f"{method}_boundaries")
        assert np.asarray(own.X.sum(axis=1)).ravel().tolist() == sums.tolist()
        assert sums.sum() > 1000
        assert "intensities" in own.obsm
    # The simulated machine's cells are the true ones, and nothing that Baysor's stand-in makes of them is better.
    frame = table.to_frame()
    assert frame["rank"].idxmin() == "vendor"
    assert frame.loc["vendor", "true_f1"] == 1
    assert frame["n_cells"].tolist() == [
        len(sdata.shapes[f"{name}_boundaries"]) for name in ("cell", "vendor", "vendor_baysor")
    ]
    assert any("transcripts of vendor+baysor were assigned by their genes" in note for note in table.notes)

    compared = Store(store).compared
    assert [[record["stage"] for record in compared[name]] for name in ("vendor", "vendor+baysor")] == [
        ["resolve", "aggregate"],
        ["resolve", "resolve", "aggregate"],
    ]
    assert method_of(Store(store)) == "generic"


@pytest.mark.slow
def test_a_method_is_run_once_and_what_it_made_is_what_the_stages_make(made, with_vendor, tmp_path):
    import cellquilt as cq

    store = tmp_path / "slide.zarr"
    shutil.copytree(with_vendor[0], store)
    sdata = spatialdata.read_zarr(store)
    seconds = Store(store).compared["vendor"][-1]
    first = cq.compare(sdata)  # those that were compared before
    assert Store(store).compared["vendor"][-1] == seconds
    assert first.methods == ("generic", "vendor")
    cq.compare(sdata, ["vendor"], overwrite=True)
    assert Store(store).compared["vendor"][-1] != seconds

    # The same from outlines alone, without the assignment that lies beside them.
    (store / "shapes/vendor_boundaries" / ASSIGNMENT).unlink()
    plain = compare_stores(
        [Source("generic", store), Source("vendor", store, "vendor_boundaries", None)], settings=Settings()
    )
    assert plain.to_dict() == first.to_dict()

    # The chosen method's own table is what it is, whichever name it is compared under.
    cells = made / "by_hand.zarr"
    assert command("resolve", "vendor", made / "whole.zarr", "-o", cells) == 0
    assert command("aggregate", made / "whole.zarr", "--cells", cells, "-o", made / "as_chosen.zarr") == 0
    assert (
        command("aggregate", made / "whole.zarr", "--cells", cells, "--name", "vendor", "-o", made / "as_compared.zarr")
        == 0
    )
    chosen, compared = (spatialdata.read_zarr(made / name) for name in ("as_chosen.zarr", "as_compared.zarr"))
    assert np.array_equal(chosen.tables["table"].X.toarray(), compared.tables["table_vendor"].X.toarray())
    assert not compared.points
    ours = spatialdata.read_zarr(store).tables["table_vendor"]
    assert np.array_equal(ours.X.toarray(), compared.tables["table_vendor"].X.toarray())


@pytest.mark.slow
def test_cells_that_fail_are_dropped_from_a_compared_method_too(made, store):
    import cellquilt as cq

    sdata = spatialdata.read_zarr(store)
    cq.aggregate(sdata, min_transcripts=60, drop_failed=True)
    kept = len(sdata.shapes["cell_boundaries"])
    assert command("resolve", "vendor", store, "-o", store.parent / "cells.zarr") == 0
    options = ("--min-transcripts", "60", "--drop-failed")
    output = store.parent / "table.zarr"
    assert (
        command("aggregate", store, "--cells", store.parent / "cells.zarr", "--name", "vendor", *options, "-o", output)
        == 0
    )
    own = spatialdata.read_zarr(output)
    sums = np.asarray(own.tables["table_vendor"].X.sum(axis=1)).ravel()
    assert 0 < len(sums) < len(read_shapes(store.parent / "cells.zarr/shapes/cell_boundaries"))
    assert sums.min() >= 60
    assert len(own.shapes["vendor_boundaries"]) == len(sums)
    assert len(spatialdata.read_zarr(store).shapes["cell_boundaries"]) == kept


def test_a_published_store_is_compared_and_reported(made, with_vendor, tmp_path, capsys):
    store, table = with_vendor
    out, tsv, page = tmp_path / "comparison.json", tmp_path / "comparison.tsv", tmp_path / "report.html"
    settings = json.dumps({"compare": ["vendor", "proseg"]})  # as the pipeline hands them on
    assert command("compare", store, "-o", out, "-o", tsv, "--settings", settings) == 0
    assert "no cells by proseg" in capsys.readouterr().err
    found = read_comparison(out)
    assert found.notes == ("no cells by proseg: the run's log says why", *table.notes)
    assert {**found.to_dict(), "notes": []} == {**table.to_dict(), "notes": []}
    assert [line.split("\t")[0] for line in tsv.read_text().splitlines()] == ["method", "generic", "vendor"]

    assert command("report", store, "--comparison", out, "-o", page) == 0
    html = page.read_text()
    section = html[html.index('<section id="methods">') :]
    section = section[: section.index("</section>") + len("</section>")]
    section = re.sub(r"\s+", " ", " ".join(Page(section).words))
    assert "generic (this report) vendor" in section
    for group in methods_context(found)["groups"]:
        for row in group["rows"]:
            shown = re.escape(" ".join([row["title"], row["arrow"], *(cell["text"] for cell in row["cells"])]))
            assert re.search(re.sub(r"(\\ )+", r"\\s+", shown), section), row
    assert "No cells by proseg" in section
    assert '<a href="#methods">' in html
    data = json.loads(re.search(r'id="cellquilt-report">(.*?)</script>', html, re.DOTALL).group(1))
    assert data["comparison"] == json.loads(out.read_text())

    assert command("report", store, "-o", tmp_path / "alone.html") == 0
    assert "Methods compared" not in (tmp_path / "alone.html").read_text()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_truth_may_be_left_out(made, with_vendor, tmp_path, wanted):
    out, settings = tmp_path / "c.json", json.dumps({"report_truth": wanted})
    assert command("compare", with_vendor[0], "-o", out, "--truth", made / "slide/truth", "--settings", settings) == 0
    assert ("true_f1" in read_comparison(out).values) == wanted


@pytest.mark.slow
def test_a_method_that_finds_no_cell_is_compared_all_the_same(made, store, tmp_path, monkeypatch):
    import cellquilt as cq

    (tmp_path / "blind.py").write_text("import numpy\ndef sees(image):\n    return numpy.zeros(image.shape[1:], int)\n")
    monkeypatch.syspath_prepend(tmp_path)
    sdata = spatialdata.read_zarr(store)
    cq.segmentation.vendor(sdata)
    sdata.attrs["cellquilt_choices"] = {"generic_function": "blind:sees", "generic_diameter_um": 8}
    table = cq.compare(sdata, ["generic"])
    assert table.methods == ("vendor", "generic")
    assert table.values["n_cells"][1] == 0
    assert table.values["rank"] == (1, None)
    assert "no cells by generic: it is not ranked" in table.notes
    assert sdata.tables["table_generic"].n_obs == 0


@pytest.mark.slow
def test_a_slide_without_transcripts_is_compared_by_outlines(made, tmp_path):
    import cellquilt as cq

    sdata = cq.io.xenium(made / "slide", output=tmp_path / "s.zarr")
    del sdata.points["transcripts"]
    sdata.write(tmp_path / "image.zarr")
    sdata = spatialdata.read_zarr(tmp_path / "image.zarr")
    cq.segmentation.generic(sdata, RAINFALL, diameter_um=8)
    table = cq.compare(sdata, ["vendor"])
    assert sdata.tables["table_vendor"].shape == (len(sdata.shapes["vendor_boundaries"]), 0)
    assert table.values["share_assigned"] == (None, None)
    assert 0 < table.matrices["outline_f1"][0, 1] < 1


# --- what is told by outlines


def test_choosing_transcripts_by_gene_earns_no_rank():
    """One segmentation twice: plain, and with every transcript thrown out that is not of its cell's commonest gene."""
    rng = np.random.default_rng(0)
    n, cells = 20_000, 25
    xy = rng.uniform(0, 100, (n, 2))
    cell = (xy[:, 0] // 20).astype(int) * 5 + (xy[:, 1] // 20).astype(int)
    kind = rng.integers(0, 3, cells)[cell]
    gene = np.where(rng.random(n) < 0.4, kind, rng.integers(0, 9, n))
    genes = pa.DictionaryArray.from_arrays(pa.array(gene.astype(np.int32)), pa.array([f"G{k}" for k in range(9)]))
    batch = pa.table({"x": xy[:, 0], "y": xy[:, 1], "gene": genes, "is_control": np.zeros(n, bool)})
    k = np.arange(cells)
    boxes = shapely.box(k // 5 * 20, k % 5 * 20, k // 5 * 20 + 20, k % 5 * 20 + 20)
    picked = np.where(gene == kind, cell, -1)

    def table(by_genes: bool):
        two = [Segmentation("plain", boxes), Segmentation("picked", boxes, by_genes)]
        return compare(two, [(batch, [None, picked])])

    naive, ours = table(False), table(True)
    assert naive.values["rank"] == (2, 1)  # what makes the measure need outlines
    bits = ours.values["information_bits"]
    assert bits[0] == bits[1] == naive.values["information_bits"][0]
    assert ours.values["rank"] == (1, 1)
    for name in ("share_assigned", "median_transcripts_per_cell", "mecr"):  # of what was assigned, as ever
        assert ours.values[name] == naive.values[name]
    assert any("transcripts of picked" in note for note in ours.notes)
    assert not any("assigned by their genes" in note for note in naive.notes)


# --- names


def test_names_of_methods_and_chains(tmp_path):
    def run(path: Path, *methods: str, prior: str = "cell_boundaries", compared: tuple[str, ...] = ()) -> Path:
        with new_store(path, sample="s") as store:
            for method in methods:
                task = {
                    "facts": {"prior": {"from": "shapes" if prior != "vendor_cell_id" else "column", "name": prior}}
                }
                store.add_record({"stage": "resolve", "facts": {"method": method, "tasks": [task]}})
            store.add_compared({name: [] for name in compared})
        return path

    chain, alone = (
        run(tmp_path / "a.zarr", "cellpose", "proseg"),
        run(tmp_path / "b.zarr", "proseg", prior="vendor_cell_id"),
    )
    again = run(tmp_path / "c.zarr", "cellpose", "vendor", compared=("proseg", "cellpose+proseg", "generic"))
    none, other = run(tmp_path / "d.zarr"), run(tmp_path / "e.zarr", "cellpose", "proseg", prior="vendor_cell_id")
    assert [method_of(Store(path)) for path in (chain, alone, again, none, other)] == [
        *("cellpose+proseg", "proseg", "vendor", "", "proseg")
    ]
    assert default_names([chain, alone]) == ["cellpose+proseg", "proseg"]
    assert [(source.name, source.shapes, source.by_genes) for source in methods_in(again)] == [
        ("vendor", "cell_boundaries", False),
        ("cellpose+proseg", "cellpose_proseg_boundaries", True),
        ("generic", "generic_boundaries", False),
        ("proseg", "proseg_boundaries", True),
    ]
    assert [source.name for source in methods_in(again, ["proseg", "vendor", "stardust"])] == ["vendor", "proseg"]
    assert [source.name for source in methods_in(none)] == ["cell_boundaries"]


def test_a_chain_starts_from_the_machines_output_alone(made, tmp_path):
    raw = Store(as_converted(made / "whole.zarr", tmp_path / "raw.zarr"))
    assert raw.names("shapes") == ["image_patches", "vendor_cells", "vendor_nuclei"]
    assert [record["stage"] for record in raw.records] == ["convert"]
    assert raw.name == Store(made / "whole.zarr").name
    assert not (made / "whole.zarr/shapes/vendor_cells").is_symlink()


def test_the_api_takes_every_setting_by_its_keyword():
    import cellquilt as cq

    parameters = inspect.signature(cq.compare).parameters
    for setting in SETTINGS:
        if setting.group == "compare":
            assert parameters[setting.api_name].default is None


# --- wrong use: one message that names the cause, and nothing changed


def wrong(sdata, *methods: str, **more) -> CellquiltError:
    import cellquilt as cq

    before = sorted(sdata.tables), sorted(sdata.shapes)
    with pytest.raises(CellquiltError) as caught:
        cq.compare(sdata, list(methods), **more)
    assert (sorted(sdata.tables), sorted(sdata.shapes)) == before
    return caught.value


def test_wrong_methods(made, store):
    sdata = spatialdata.read_zarr(store)
    assert 'did you mean "vendor"?' in str(wrong(sdata, "vender"))
    assert 'compare names "vendor" twice' in str(wrong(sdata, "vendor", "vendor"))
    assert 'compare names "proseg+vendor"' in str(wrong(sdata, "proseg+vendor"))
    error = wrong(sdata, "generic")  # the chosen one
    assert (error.code, "generic alone" in error.message) == ("methods-too-few", True)
    assert wrong(sdata).code == "methods-too-few"


def test_methods_that_a_slide_has_nothing_for(tmp_path):
    import cellquilt as cq

    cq.simulate(tmp_path / "sim", width_px=128, seed=1)
    sdata = cq.io.ome_tif(tmp_path / "sim/slide_0/image.ome.tif")
    assert wrong(sdata, "vendor").code == "element-missing"  # no cells to compare it with
    cq.segmentation.generic(sdata, RAINFALL, diameter_um=8)
    error = wrong(sdata, "proseg")
    assert error.code == "element-missing"
    assert "transcripts" in error.message
    assert wrong(sdata, "vendor").code == "vendor-cells-missing"
    assert wrong(sdata, "vendor+baysor").code == "vendor-cells-missing"


def test_wrong_files_of_markers_are_told_before_anything_is_run(store, tmp_path, monkeypatch):
    monkeypatch.setattr("cellquilt.segmentation.cells_by", lambda *_: pytest.fail("a method was run"))
    sdata = spatialdata.read_zarr(store)
    (tmp_path / "pairs.csv").write_text("gene_a,gen_b\nA,B\n")
    error = wrong(sdata, "vendor", markers=tmp_path / "pair.csv")
    assert (error.code, error.hint) == ("marker-pairs-unreadable", 'did you mean "pairs.csv"?')
    error = wrong(sdata, "vendor", markers=str(tmp_path / "pairs.csv"))
    assert error.code == "marker-pairs-invalid"
    assert "gene_b" in error.message
    for name in ("types.csv", "types.h5ad"):
        assert wrong(sdata, "vendor", reference=tmp_path / name).code == "reference-unreadable"


def test_markers_that_are_not_on_the_panel(with_vendor, tmp_path):
    import cellquilt as cq

    sdata = spatialdata.read_zarr(with_vendor[0])
    genes = sdata.tables["table"].var_names.tolist()
    (tmp_path / "pairs.csv").write_text(f"gene_a,gene_b\n{genes[0]}x,Nothing\n")
    error = wrong(sdata, "vendor", markers=tmp_path / "pairs.csv")
    assert error.code == "marker-genes-unknown"
    assert f'did you mean "{genes[0]}' in error.hint
    (tmp_path / "good.csv").write_text(f"gene_a,gene_b\n{genes[0]},{genes[1]}\n{genes[2]},Nothing\n")
    table = cq.compare(sdata, ["vendor"], markers=tmp_path / "good.csv")
    assert table.marker_source == "file"
    assert any("1 of 2 pairs" in note for note in table.notes)
