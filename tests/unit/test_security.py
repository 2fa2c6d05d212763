"""What files from outside may do, and what never gets into a result: names of people, places and machines.

The word "planted" stands in everything that scanners and operators write beside their measurements. Every byte of what
is published is searched for it (`leaks`).
"""

import ast
import base64
import gzip
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import yaml
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import Settings
from cellquilt.readers import convert_slide
from cellquilt.readers.tiff import TiffImage
from cellquilt.readers.transcript_table import TranscriptTable
from cellquilt.report.stage import assemble_slide, report_slide, samples_table
from cellquilt.simulate import simulate
from leaks import leaks

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python/src/cellquilt"
#: What the pixels of a label say, so that a copy of them is found, too.
LABEL_PIXELS = b"plantedLABELpixels"
PEOPLE = {
    "PatientName": "Planted^Jane", "PatientID": "planted-4711", "Operator": "planted.operator",
    "Host": "planted-scanner-7", "Path": "/home/planted/slides/jane.svs",
}  # fmt: skip
PARQUET = {b"patient": b"planted patient", b"origin": b"/home/planted/export", b"pandas": b'{"creator": "planted"}'}


def test_the_search_finds_a_name_in_every_form(tmp_path):
    import anndata
    import pandas as pd
    from PIL import Image, PngImagePlugin

    word = "planted name"
    table = anndata.AnnData(
        np.zeros((300, 1)), obs=pd.DataFrame({"who": [word] * 300}, index=[f"c{k}" for k in range(300)])
    )
    forms = tmp_path / "forms"
    forms.mkdir()
    table.write_zarr(forms / "table.zarr")
    table.write_h5ad(forms / "table.h5ad", compression="gzip")
    rows = pa.table({"x": np.arange(3)})
    pq.write_table(rows.replace_schema_metadata({"who": word}), forms / "metadata.parquet")
    pq.write_table(pa.table({"x": [word] * 3}), forms / "rows.parquet", compression="zstd")
    with zipfile.ZipFile(forms / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", word * 100)
    (forms / "a.csv.gz").write_bytes(gzip.compress(word.encode() * 100))
    told = PngImagePlugin.PngInfo()
    told.add_text("Author", word, zip=True)
    Image.new("L", (4, 4)).save(forms / "a.png", pnginfo=told)
    page = b"<html>base64," + base64.b64encode((forms / "a.png").read_bytes())
    (forms / "a.html").write_bytes(page)
    pixels = np.frombuffer(LABEL_PIXELS * 256, np.uint8).reshape(-1, 18)
    tifffile.imwrite(forms / "a.tif", pixels, compression="zlib")
    found = leaks(forms)
    for name in ("table.zarr", "table.h5ad", "metadata.parquet", "rows.parquet", "a.zip", "a.csv.gz", "a.png", "a.html",
                 "a.tif"):  # fmt: skip
        assert any(name in line for line in found), name
    assert leaks(tmp_path / "nothing") == []


# --- planting


def ome_xml(pixels: str) -> str:
    """OME-XML with all that a microscope may say about people and places."""
    said = "".join(
        f'<XMLAnnotation ID="Annotation:{k}"><Value><{name}>{value}</{name}></Value></XMLAnnotation>'
        for k, (name, value) in enumerate(PEOPLE.items())
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'Creator="planted workstation" UUID="urn:uuid:8e1f7d54-0a43-4c5f-9c1f-2f6c2d1f0b11">'
        '<Experimenter ID="Experimenter:0" FirstName="Planted" LastName="Planted" Email="planted@example.org" '
        'UserName="planted"/><Image ID="Image:0" Name="planted tissue of Jane">'
        f"<Description>Patient: planted Jane, born 1970</Description>{pixels}</Image>"
        '<Image ID="Image:1" Name="label image"><Pixels ID="Pixels:1" Type="uint8" DimensionOrder="XYCZT" SizeX="72" '
        'SizeY="64" SizeC="1" SizeZ="1" SizeT="1"><Channel ID="Channel:1:0" SamplesPerPixel="1"/>'
        '<TiffData IFD="2" PlaneCount="1"/></Pixels></Image>'
        f"<StructuredAnnotations>{said}</StructuredAnnotations></OME>"
    )


def label() -> np.ndarray:
    return np.frombuffer((LABEL_PIXELS * 256)[: 64 * 72], np.uint8).reshape(64, 72)


def plant_ome_tif(simulated: Path, folder: Path) -> dict[str, Path]:
    """The simulated image with a label, OME-XML that names people, and a table that says where it is from."""
    image = tifffile.imread(simulated / "image.ome.tif")
    _, height, width = image.shape
    pixels = (
        f'<Pixels ID="Pixels:0" Type="uint16" DimensionOrder="XYCZT" SizeX="{width}" SizeY="{height}" SizeC="2" '
        'SizeZ="1" SizeT="1" PhysicalSizeX="0.2125" PhysicalSizeY="0.2125"><Channel ID="Channel:0:0" Name="DAPI" '
        'SamplesPerPixel="1"/><Channel ID="Channel:0:1" Name="Cellbound" SamplesPerPixel="1"/>'
        '<TiffData IFD="0" PlaneCount="2"/></Pixels>'
    )
    path = folder / "image.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(image[0], photometric="minisblack", description=ome_xml(pixels).encode(), metadata=None)
        writer.write(image[1], photometric="minisblack", software="planted software", metadata=None)
        writer.write(label(), photometric="minisblack", metadata=None)
    rows = pq.read_table(simulated / "transcripts.parquet").replace_schema_metadata(PARQUET)
    pq.write_table(rows, folder / "transcripts.parquet")
    outlines = {
        "type": "FeatureCollection", "name": "planted cells", "creator": PEOPLE,
        "features": [{"type": "Feature", "properties": {"patient": "planted", "cell_id": f"n{k}"},
                      "geometry": {"type": "Polygon", "coordinates": [[[k, 1], [k + 2, 1], [k + 2, 3], [k, 1]]]}}
                     for k in range(1, 40, 5)],
    }  # fmt: skip
    (folder / "prior.geojson").write_text(json.dumps(outlines))
    return {"slide": path, "transcripts": folder / "transcripts.parquet", "prior_cells": folder / "prior.geojson"}


def plant_xenium(simulated: Path, folder: Path) -> dict[str, Path]:
    """A bundle whose manifest, images and tables name people."""
    bundle = shutil.copytree(simulated, folder / "liver_1", ignore=shutil.ignore_patterns("truth"))
    manifest = json.loads((bundle / "experiment.xenium").read_text())
    for key in (
        "run_name",
        "region_name",
        "cassette_name",
        "slide_id",
        "panel_name",
        "instrument_sn",
        "experiment_uuid",
    ):
        manifest[key] = f"planted {key}"
    (bundle / "experiment.xenium").write_text(json.dumps({**manifest, **PEOPLE, "notes": [PEOPLE]}))
    for path in sorted((bundle / "morphology_focus").iterdir()):
        comment = tifffile.tiffcomment(path)
        people = "".join(f"<XMLAnnotation ID='A:{k}'><Value>planted</Value></XMLAnnotation>" for k in range(2))
        comment = comment.replace("</OME>", f"<StructuredAnnotations>{people}</StructuredAnnotations></OME>")
        tifffile.tiffcomment(
            path, re.sub(r'(<Image [^>]*Name=")', r"\1planted ", comment).encode("ascii", "xmlcharrefreplace")
        )
    for path in sorted(bundle.glob("*.parquet")):
        pq.write_table(pq.read_table(path).replace_schema_metadata(PARQUET), path)
    return {"slide": bundle}


def plant_merscope(simulated: Path, folder: Path) -> dict[str, Path]:
    """A region with a manifest and tables that name people."""
    region = shutil.copytree(simulated, folder / "region_0", ignore=shutil.ignore_patterns("truth"))
    (region / "manifest.json").write_text(json.dumps({**PEOPLE, "hash": "planted"}))
    (region / "images" / "manifest.json").write_text(json.dumps({**PEOPLE, "microns_per_pixel": 0.108}))
    (region / "experiment.json").write_text(json.dumps(PEOPLE))
    path = region / "cell_boundaries.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **PARQUET}), path)
    return {"slide": region}


PLANT = {"ome_tif": plant_ome_tif, "xenium": plant_xenium, "merscope": plant_merscope}


@pytest.fixture(scope="module")
def planted_machine(tmp_path_factory) -> Iterator[Path]:
    """A machine whose user, host and folders have planted names."""
    base = tmp_path_factory.mktemp("machine") / "planted home"
    (base / "planted work").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base / "planted work")
        patch.setattr(socket, "gethostname", lambda: "planted-host")
        patch.setattr("platform.node", lambda: "planted-host")
        patch.setenv("HOME", str(base))
        for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOST"):
            patch.setenv(name, "planted-user")
        patch.setenv("TMPDIR", str(base / "planted work"))
        yield base


@pytest.fixture(scope="module", params=sorted(PLANT))
def published(request, planted_machine) -> tuple[str, Path]:
    """What is published of a slide whose files name people: technology, folder."""
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.explorer import write as write_explorer
    from cellquilt.formats.stage import export_slide
    from cellquilt.resolve.stage import resolve_slide
    from cellquilt.segment.stages import find_tissue, patchify_image, segment_source

    technology = request.param
    inputs, work, out = (planted_machine / f"planted {name} {technology}" for name in ("inputs", "work", "out"))
    inputs.mkdir()
    simulate(inputs / "simulated", format=technology, width_px=320)
    given = PLANT[technology](inputs / "simulated" / "slide_0", inputs)
    settings = Settings(segmentation="generic", generic_diameter_um=8, patch_width_px=256, z="max")
    raw, tissue, patches, cells, table = (
        work / f"s1.{name}.zarr" for name in ("raw", "tissue", "patches", "cells", "table")
    )
    convert_slide(
        **given, technology=technology, sample="s1", output=raw, settings=settings,
        source=f"/home/planted/clinic of Jane/{given['slide'].name}",
    )  # fmt: skip
    find_tissue(raw, settings=settings, output=tissue)
    bundles = patchify_image(raw, settings=settings, tissue=tissue, bundles=work / "bundles", output=patches)
    results = [
        segment_source(bundle, method="generic", settings=settings, output=bundle.with_suffix(".cells.parquet"))[0]
        for bundle in bundles
    ]
    resolve_slide(raw, results, settings=settings, output=cells)
    aggregate_slide(raw, settings=settings, cells=cells, output=table)
    store = assemble_slide([raw, tissue, patches, cells, table], out / "s1.zarr", settings=settings, qc=out / "qc.json")
    report_slide(store, out / "report.html", settings=settings, qc=out / "qc.json")
    samples_table([out / "qc.json"], "s1", out / "samples.tsv")
    formats = ["qupath", "vpt"] + (["xeniumranger"] if technology == "xenium" else [])
    export_slide(store, out / "exports", formats, settings=settings)
    write_explorer(store, out / "explorer", tables=True)
    return technology, out


def test_no_planted_name_is_published(published):
    technology, out = published
    assert leaks(out, "/home/", "pytest-of", str(ROOT)) == []
    assert (out / "report.html").stat().st_size > 10_000
    import anndata

    assert anndata.read_zarr(out / "s1.zarr" / "tables" / "table").n_obs > 5, technology


def test_what_was_measured_is_there_all_the_same(published):
    from cellquilt.core.store import Store

    technology, out = published
    store = Store(out / "s1.zarr")
    assert store.names("images") == ["image" if technology == "ome_tif" else "morphology"]
    attributes = store.attributes
    assert attributes["technology"] == technology
    assert len(attributes["inputs"]) >= 3
    # The folder or file of the slide by its own name, never by where it is.
    assert attributes["records"][0]["facts"]["sources"]["path"] in ("image.ome.tif", "liver_1", "region_0")


# --- scanners' pictures of the glass


def test_a_label_that_is_larger_than_the_tissue_is_not_taken(tmp_path):
    tissue = np.full((32, 40), 7, np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        writer.write(label(), photometric="minisblack", metadata={"axes": "YX", "Name": "label image"})
        writer.write(tissue, photometric="minisblack", metadata={"axes": "YX", "Name": "tissue"})
        writer.write(label()[::-1], photometric="minisblack", metadata={"axes": "YX", "Name": "Macro Image"})
    with TiffImage(tmp_path / "a.ome.tif") as image:
        assert image.shape == (1, 1, 32, 40)
        assert (image.read(0, 0, 0, 32, 0, 40) == 7).all()


def test_an_image_that_is_called_so_by_its_user_is_read(tmp_path):
    tifffile.imwrite(tmp_path / "labels.ome.tif", label(), metadata={"axes": "YX", "Name": "label"})
    with TiffImage(tmp_path / "labels.ome.tif") as image:
        assert image.shape == (1, 1, 64, 72)


def test_of_a_whole_slide_file_the_tissue_is_read_and_the_description_is_not(tmp_path):
    said = "Aperio Image Library v1\n500x400 |AppMag = 20|User = planted|Patient = planted|MPP = 0.5"
    tissue = np.full((400, 500, 3), 200, np.uint8)
    rgb = np.repeat(label()[..., None], 3, axis=2)
    with tifffile.TiffWriter(tmp_path / "a.svs") as writer:
        writer.write(tissue, photometric="rgb", tile=(128, 128), description=said, metadata=None)
        writer.write(np.ascontiguousarray(tissue[::4, ::4]), photometric="rgb", description=said, metadata=None)
        writer.write(
            rgb, photometric="rgb", description="Aperio Image Library v1\nlabel 72x64", metadata=None, subfiletype=1
        )
        writer.write(
            rgb, photometric="rgb", description="Aperio Image Library v1\nmacro 72x64", metadata=None, subfiletype=9
        )
    store = convert_slide(
        tmp_path / "a.svs", technology="ome_tif", sample="s", output=tmp_path / "out" / "s.zarr", settings=Settings()
    )
    assert store.is_dir()
    assert leaks(tmp_path / "out") == []
    with TiffImage(tmp_path / "a.svs") as image:
        assert image.shape == (3, 1, 400, 500)
        assert image.pixel_size_um == (0.5, 0.5)


# --- files that want to do something


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "codecs",
    [
        {"filters": [{"id": "pickle"}], "compressor": None},
        {"filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "compressor": None},
        {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}},
    ],
)
def test_a_zarr_array_of_pickles_is_not_unpickled(tmp_path, codecs):
    from cellquilt.spatial.files import read_tables

    marker = tmp_path / "owned"
    folder = tmp_path / "cells.zarr"
    (folder / "X").mkdir(parents=True)
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / ".zattrs").write_text('{"encoding-type": "anndata", "encoding-version": "0.1.0"}')
    about = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C", **codecs}
    (folder / "X" / ".zarray").write_text(json.dumps(about))
    (folder / "X" / ".zattrs").write_text('{"encoding-type": "string-array", "encoding-version": "0.2.0"}')
    (folder / "X" / "0").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(CellquiltError) as caught:
        list(read_tables([folder], None))
    assert caught.value.code == "table-unreadable"
    assert not marker.exists()


def test_weights_with_code_in_them_are_not_run(tmp_path):
    from cellquilt.segment.cellpose import _stored_diameter
    from cellquilt.segment.cpnet import load_state_dict, read_metadata

    marker = tmp_path / "owned"
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"diam_mean": Evil(marker)}))
    assert _stored_diameter(tmp_path / "evil.pth") is None
    np.savez(tmp_path / "evil.npz", metadata=np.array([Evil(marker)], dtype=object))
    for read in (read_metadata, lambda path: load_state_dict(path, None)):
        with pytest.raises((ValueError, KeyError, CellquiltError)):
            read(tmp_path / "evil.npz")
    assert not marker.exists()


def test_an_index_of_weights_that_swells_is_not_read(tmp_path):
    from cellquilt.segment import cellpose

    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * (cellpose._LARGEST_INDEX + 1))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    assert cellpose._stored_diameter(tmp_path / "bomb.pth") is None


_TRY_WEIGHTS = """
import os, sys, torch
from pathlib import Path
from cellquilt.segment import cellpose
class Evil:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)
torch.save({"W2": Evil()}, sys.argv[1])
load = cellpose._load_3 if sys.argv[3] == "3" else lambda torch, path: cellpose._load_4(torch, path, False)
try:
    load(torch, Path(sys.argv[1]))
except Exception as error:
    print("refused", type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["3", "4"])
def test_the_library_does_not_run_code_of_weights_whatever_its_version(tmp_path, generation):
    python = ROOT / ".venv" / f"cellpose{generation}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment cellpose{generation}")
    marker = tmp_path / "owned"
    done = subprocess.run(
        [python, "-c", _TRY_WEIGHTS, tmp_path / "evil.pth", marker, generation],
        # A user may have switched torch's own protection off for another program.
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "refused UnpicklingError"
    assert not marker.exists()


def test_yaml_with_code_is_refused(tmp_path):
    from cellquilt.report.qc import compute_qc
    from cellquilt.report.view import View
    from synthetic_slide import make_parts

    marker = tmp_path / "owned"
    limits = tmp_path / "limits.yml"
    limits.write_text(f"- !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(CellquiltError) as caught:
        compute_qc(View(make_parts(tmp_path / "parts")), thresholds=limits)
    assert caught.value.code == "qc-thresholds-unreadable"
    assert not marker.exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(limits.read_text())


def with_description(path: Path, text: str) -> Path:
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8), description=text.encode(), metadata=None)
    return path


def test_entities_of_xml_are_neither_swollen_nor_fetched(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("planted secret")
    pixels = (
        '<Pixels ID="Pixels:0" Type="uint8" DimensionOrder="XYCZT" SizeX="16" SizeY="16" SizeC="1" SizeZ="1" SizeT="1">'
        '<Channel ID="Channel:0:0" Name="&x;" SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1"/></Pixels>'
    )
    body = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">{pixels}</Image></OME>'
    swelling = "".join(f'<!ENTITY x{k} "{f"&x{k - 1};" * 10}">' for k in range(1, 10))
    for number, entities in enumerate(
        (f'<!ENTITY x SYSTEM "file://{secret}">', f'<!ENTITY x0 "aaaaaaaaaa">{swelling}<!ENTITY x "&x9;">')
    ):
        path = with_description(
            tmp_path / f"{number}.ome.tif", f'<?xml version="1.0"?><!DOCTYPE OME [{entities}]>{body}'
        )
        start = time.monotonic()
        with pytest.raises(CellquiltError) as caught:
            TiffImage(path)
        assert caught.value.code == "ome-xml-invalid"
        assert "secret" not in str(caught.value)
        assert time.monotonic() - start < 5


def test_an_ome_tif_does_not_open_files_beside_its_folder(tmp_path):
    (tmp_path / "slide").mkdir()
    outside = tmp_path / "other.tif"
    tifffile.imwrite(outside, np.full((16, 16), 99, np.uint8), metadata=None)
    uuid = "urn:uuid:11111111-2222-3333-4444-555555555555"
    body = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0"><Image '
        'ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" DimensionOrder="XYCZT" SizeX="16" SizeY="16" SizeC="2" '
        'SizeZ="1" SizeT="1" PhysicalSizeX="1"><Channel ID="C:0"/><Channel ID="C:1"/>'
        '<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:0</UUID></TiffData>'
        f'<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="../other.tif">{uuid}</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    path = with_description(tmp_path / "slide" / "a.ome.tif", body)
    with pytest.raises(CellquiltError) as caught:
        TiffImage(path)
    assert caught.value.code == "tiff-planes-missing"


def test_a_table_that_swells_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "t.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"x,y,gene\n1,2,")
        for _ in range(200):
            file.write(b"a" * (1 << 20))
    assert path.stat().st_size < 2 << 20
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom cellquilt.core.errors import CellquiltError\n"
        "from cellquilt.readers.transcript_table import TranscriptTable\n"
        "table = TranscriptTable(Path(sys.argv[1]))\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    list(table.batches())\nexcept CellquiltError as error:\n    print(error.code)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    said, grown_mb = done.stdout.split()
    assert said in ("transcripts-bad-row", "transcripts-unreadable")
    assert int(grown_mb) < 150


def test_archives_are_not_unpacked_but_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.csv", "w") as archive:
        archive.writestr("../../planted.csv", "x,y,gene\n")
    with pytest.raises(CellquiltError) as caught:
        TranscriptTable(tmp_path / "t.csv")
    assert caught.value.code == "transcripts-unreadable"
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_table_with_links_out_of_its_folder_is_not_copied(tmp_path, kind):
    from cellquilt.report.stage import annotate_sample

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("planted")
    (tmp_path / "cells.zarr" / "obs").mkdir(parents=True)
    target = tmp_path / "elsewhere" / "secret" if kind == "file" else tmp_path / "elsewhere"
    (tmp_path / "cells.zarr" / "obs" / "x").symlink_to(target)
    with pytest.raises(CellquiltError) as caught:
        annotate_sample(tmp_path / "cells.zarr", tmp_path / "out.zarr", domains=tmp_path / "none.parquet")
    assert caught.value.code == "link-outside"
    assert not (tmp_path / "out.zarr").exists()
    # The table itself may be a link: so tasks get their inputs.
    (tmp_path / "cells.zarr" / "obs" / "x").unlink()
    (tmp_path / "staged.zarr").symlink_to(tmp_path / "cells.zarr")
    with pytest.raises(Exception) as other:  # noqa: PT011 - that there are no domains
        annotate_sample(tmp_path / "staged.zarr", tmp_path / "out.zarr", domains=tmp_path / "none.parquet")
    assert getattr(other.value, "code", "") != "link-outside"


# --- what is shown


def test_names_in_the_data_are_text_in_the_report(tmp_path):
    odd = "<img src=x onerror=alert(1)></script>"
    image = np.zeros((2, 64, 64), np.uint16)
    image[:, 20:30, 20:30] = 900
    tifffile.imwrite(
        tmp_path / "a.ome.tif", image, photometric="minisblack",
        metadata={"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Channel": {"Name": [odd, "DAPI"]}},
    )  # fmt: skip
    (tmp_path / "t.csv").write_text(f"x,y,gene\n12,12,{odd}\n13,12,{odd}\n")
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.resolve.stage import resolve_slide
    from cellquilt.segment.stages import segment_source

    settings = Settings(segmentation="generic", generic_diameter_um=5, generic_channels="DAPI")
    store = convert_slide(
        tmp_path / "a.ome.tif", technology="ome_tif", transcripts=tmp_path / "t.csv", sample="s",
        output=tmp_path / "s.zarr", settings=settings,
    )  # fmt: skip
    segment_source(store, method="generic", settings=settings)
    resolve_slide(store, settings=settings)
    aggregate_slide(store, settings=settings)
    page = report_slide(store, tmp_path / "report.html", settings=settings).read_text()
    assert "&lt;img src=x" in page or "\\u003cimg" in page
    assert "<img src=x" not in page


def test_a_message_of_several_lines_is_one_row_of_samples_tsv(tmp_path):
    missing = {"code": "genes-missing", "stage": "X", "message": "one\ttwo\nthree\r\nfour", "hint": "a\n\tb"}
    (tmp_path / "a.json").write_text(json.dumps({"sample": "a", "verdict": "PASS", "domains_missing": missing}))
    samples_table([tmp_path / "a.json"], "a", tmp_path / "samples.tsv")
    head, row = (line.split("\t") for line in (tmp_path / "samples.tsv").read_text().splitlines())
    assert dict(zip(head, row, strict=True))["cause"] == "domains missing: one two three four"


# --- what the sources do not do


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    return list(_calls())


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(PACKAGE)), ast.unparse(node.func), node


def test_nothing_unpacks_unpickles_or_evaluates():
    forbidden = re.compile(
        r"(^|\.)(extractall|extract|unpack_archive|popen|mktemp|urlopen|urlretrieve)$|^os\.system$|^(eval|exec|compile)$"
        r"|^(pickle|dill|cloudpickle|joblib|shelve|marshal)\.|^yaml\.(load|full_load|unsafe_load)$|^torch\.jit\.load$"
    )
    found = [(file, name) for file, name, _ in calls() if forbidden.search(name)]
    # A pickle's reader that knows four harmless names, for one number; and its own error.
    assert set(found) == {("segment/cellpose.py", "pickle.UnpicklingError")}


def test_weights_and_arrays_are_loaded_without_code_and_no_shell_is_asked():
    seen = set()
    for file, name, call in calls():
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True", file
        if name in ("np.load", "numpy.load"):
            assert "allow_pickle" not in keywords or ast.unparse(keywords["allow_pickle"]) == "False", file
        seen.add(name)
        assert "shell" not in keywords or name.split(".")[0] != "subprocess", (file, name)
        if name.endswith(("load_model", "model_from_json")):
            raise AssertionError((file, name))
    assert {"torch.load", "np.load"} <= seen


def test_no_value_of_the_machine_is_asked_for():
    asked = {"socket.gethostname", "socket.getfqdn", "platform.node", "getpass.getuser", "os.uname", "os.getlogin"}
    assert {(file, name) for file, name, _ in calls() if name in asked} == set()


def test_a_record_knows_no_folder_not_even_in_a_store_that_is_worked_on():
    from cellquilt.core.record import Record

    facts = {"warnings": ["/home/planted/x.tif says 1 µm"], "channels": ["ATP1A1/CD45/E-Cadherin"]}
    made = Record("segment", "s", {"cellpose_model": "/home/planted/liver.pt"}, facts).finish()
    assert made["parameters"] == {"cellpose_model": "liver.pt"}
    assert made["facts"] == {"warnings": ["x.tif says 1 µm"], "channels": ["ATP1A1/CD45/E-Cadherin"]}
