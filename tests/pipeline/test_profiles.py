"""Profiles: what each asks of its executor and engine, and the scripts that schedulers get."""

import json
import os
from pathlib import Path

import pytest
from cellquilt import __version__
from runner import ROOT, Nextflow

CALLS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("standard", {}),
    "results": ("standard", {"outdir": "here", "gpus": 3}),
    "slurm": ("slurm", {"queue": "long", "gpu_queue": "a100", "gpu_options": "--gres=gpu:a100:1", "project": "lab1"}),
    "slurm_plain": ("slurm", {}),
    "lsf": ("lsf", {"queue": "normal", "project": "lab1"}),
    "pbs": ("pbs", {"gpu_queue": "gpus", "project": "lab1"}),
    "k8s": ("k8s", {"storage_claim": "claim", "gpu_type": "nvidia.com/mig"}),
    "awsbatch": ("awsbatch", {"queue": "cpus", "gpu_queue": "gpus", "region": "eu-west-1", "workdir_bucket": "s3://b/w"}),
    "googlebatch": ("googlebatch", {"project": "p", "region": "europe-west4", "workdir_bucket": "gs://b/w"}),
    "google_on_demand": ("googlebatch", {"project": "p", "spot": False, "gpu_type": "nvidia-l4"}),
    "azurebatch": ("azurebatch", {"region": "westeurope", "workdir_bucket": "az://c/w"}),
    "azure_pool": ("azurebatch", {"queue": "pool", "gpu_queue": "gpupool"}),
    "docker": ("docker", {"container_registry": "registry.example.org/lab/", "container_version": "0.1.0-lab"}),
    "podman": ("podman", {}),
    "singularity": ("slurm,singularity", {}),
    "apptainer": ("apptainer,slurm", {}),
    "copy": ("copy", {}),
    "test": ("test", {"outdir": "here"}),
    "test_full": ("test_full", {"domains": "zeroshot"}),
    "institute": ("standard", {"custom_config_base": str(ROOT / "tests/pipeline/institute")}),
    "unknown": ("slrum", {}),
}  # fmt: skip
#: Label of a stage → name of its image.
STAGES = {label: label for label in ("core", "domains", "stardist", "baysor", "proseg")} | {"cellpose3": "cellpose"}


@pytest.fixture(scope="module", params=["v1", "v2"])
def configurations(request, tmp_path_factory):
    """Call → configuration, by either parser of Nextflow's."""
    folder = tmp_path_factory.mktemp(f"profiles_{request.param}")
    calls = [{"profile": profile, "params": params} for profile, params in CALLS.values()]
    (folder / "calls.json").write_text(json.dumps(calls))
    run = Nextflow(folder)(
        "run", ROOT / "tests/pipeline/check_profiles", "--calls", folder / "calls.json", "--repository", ROOT,
        "--output", folder / "found.json", NXF_SYNTAX_PARSER=request.param,
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    return dict(zip(CALLS, json.loads((folder / "found.json").read_text()), strict=True))


def test_every_profile_holds_what_was_asked(configurations):
    def process(call: str) -> dict:
        assert "error" not in configurations[call], configurations[call]
        return configurations[call]["process"]

    def gpu(call: str) -> dict:
        return process(call)["withLabel:process_gpu"]

    assert process("plain")["executor"] == "local"
    assert gpu("plain")["maxForks"] == 1
    assert configurations["plain"]["trace"]["enabled"] is False
    assert (gpu("results")["maxForks"], configurations["results"]["env"]["CELLQUILT_GPUS"]) == (3, 3)
    assert configurations["results"]["trace"]["file"] == "here/pipeline_info/trace.txt"
    assert not process("plain").get("accelerator")

    assert (process("slurm")["executor"], process("slurm")["queue"]) == ("slurm", "long")
    assert process("slurm")["clusterOptions"] == "--account=lab1"
    assert (gpu("slurm")["queue"], gpu("slurm")["clusterOptions"]) == ("a100", "--account=lab1 --gres=gpu:a100:1")
    assert (process("slurm_plain")["queue"], gpu("slurm_plain")["clusterOptions"]) == (None, "--gres=gpu:1")
    assert configurations["slurm"]["executor"]["queueSize"] == 200

    assert (process("lsf")["executor"], process("lsf")["queue"]) == ("lsf", "normal")
    assert (gpu("lsf")["queue"], gpu("lsf")["clusterOptions"]) == ("normal", "-P lab1 -gpu num=1")
    assert (process("pbs")["executor"], gpu("pbs")["queue"]) == ("pbspro", "gpus")
    assert gpu("pbs")["clusterOptions"] == "-P lab1 -l select=1:ncpus=2:mem=8192mb:ngpus=1 -l walltime=04:00:00"

    assert process("k8s")["executor"] == "k8s"
    assert configurations["k8s"]["k8s"]["storageClaimName"] == "claim"
    assert gpu("k8s")["accelerator"] == {"request": 1, "type": "nvidia.com/mig"}
    assert gpu("k8s")["pod"][0]["mountPath"] == "/dev/shm"

    assert (process("awsbatch")["executor"], process("awsbatch")["queue"]) == ("awsbatch", "cpus")
    assert gpu("awsbatch")["queue"] == "gpus"
    assert (gpu("awsbatch")["accelerator"], gpu("awsbatch")["containerOptions"]) == (1, "--shm-size 4096")
    assert configurations["awsbatch"]["aws"]["region"] == "eu-west-1"
    assert configurations["awsbatch"]["workDir"] == "s3://b/w"
    assert configurations["awsbatch"]["aws"]["batch"]["maxSpotAttempts"] == 3

    google = configurations["googlebatch"]["google"]
    assert (google["project"], google["location"], google["batch"]["spot"]) == ("p", "europe-west4", True)
    assert (gpu("googlebatch")["accelerator"]["type"], google["batch"]["installGpuDrivers"]) == (
        "nvidia-tesla-t4",
        True,
    )
    assert configurations["google_on_demand"]["google"]["batch"]["spot"] is False
    assert gpu("google_on_demand")["accelerator"]["type"] == "nvidia-l4"

    azure = configurations["azurebatch"]["azure"]["batch"]
    assert (azure["location"], azure["autoPoolMode"]) == ("westeurope", True)
    assert azure["pools"]["auto"]["lowPriority"] is True
    assert configurations["azure_pool"]["azure"]["batch"]["autoPoolMode"] is False
    assert (process("azure_pool")["queue"], gpu("azure_pool")["queue"]) == ("pool", "gpupool")

    assert (process("copy")["stageInMode"], process("copy")["stageOutMode"], process("copy")["scratch"]) == (
        "copy",
        "copy",
        True,
    )
    assert configurations["test"]["params"]["input"] == f"{ROOT}/assets/test/sheet.csv"
    assert process("test")["resourceLimits"]["cpus"] == 4
    assert (configurations["test_full"]["params"]["preset"], configurations["test_full"]["params"]["domains"]) == (
        "xenium",
        "zeroshot",
    )
    assert configurations["institute"]["params"]["config_profile_name"] == "An institute"
    assert "slrum" in configurations["unknown"]["error"]


def test_engines_take_one_image_a_stage(configurations):
    for call, engine in (
        ("docker", "docker"),
        ("podman", "podman"),
        ("singularity", "singularity"),
        ("apptainer", "apptainer"),
    ):
        configuration = configurations[call]
        assert configuration[engine]["enabled"] is True
        registry, version = (
            ("registry.example.org/lab/", "0.1.0-lab") if call == "docker" else ("localhost/", __version__)
        )
        for label, image in STAGES.items():
            asked = configuration["process"][f"withLabel:env_{label}"]["container"]
            assert asked == f"{registry}cellquilt-{image}:{version}"
        assert (
            configuration["process"]["withName:SEGMENT_CELLPOSE4"]["container"]
            == f"{registry}cellquilt-cellpose4:{version}"
        )
    assert configurations["singularity"]["process"]["withLabel:process_gpu"]["containerOptions"] == "--nv"
    assert configurations["singularity"]["process"]["executor"] == "slurm"
    assert configurations["podman"]["process"]["withLabel:process_gpu"]["containerOptions"].startswith(
        "--device nvidia.com/gpu=all"
    )
    for cloud in ("awsbatch", "googlebatch", "azurebatch", "k8s"):
        assert configurations[cloud]["process"]["withLabel:env_core"]["container"].startswith(
            "localhost/cellquilt-core:"
        )


def test_a_spot_machine_that_was_taken_back_is_tried_again(configurations):
    assert configurations["plain"]["process"]["errorStrategy"] == "retry"  # exit status 50001, as the check says
    limits = configurations["plain"]["process"]["resourceLimits"]
    assert limits["cpus"] == os.cpu_count()
    assert int(limits["memory"].split()[0].split(".")[0]) > 0


#: Profile → the scheduler's programs to submit and to list, and what it says of a job that it took.
SCHEDULERS = {
    "slurm": ("sbatch", "squeue", "Submitted batch job 7"),
    "lsf": ("bsub", "bjobs", "Job <7> is submitted to queue <long>."),
    "pbs": ("qsub", "qstat", "7.server"),
}
SITE = ("--queue", "long", "--gpu_queue", "a100", "--project", "lab1", "--outdir", "results")


def scheduler(folder: Path, profile: str, *, refuses: bool = False) -> str:
    """A PATH with a scheduler that runs each job at once, or takes none."""
    submit, listing, reply = SCHEDULERS[profile]
    run = "exit 1" if refuses else f"setsid bash .command.run >/dev/null 2>&1 &\necho '{reply}'"
    for program, does in ((submit, run), (listing, "exit 0")):
        folder.mkdir(exist_ok=True)
        (folder / program).write_text(f"#!/bin/bash\nexec 0</dev/null\n{does}\n")
        (folder / program).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("profile", "of_cpu", "of_gpu"),
    [
        ("slurm", ["#SBATCH -p long", "#SBATCH --mem 3072M", "#SBATCH -t 02:00:00", "#SBATCH --account=lab1"],
         ["#SBATCH -p a100", "#SBATCH -c 2", "#SBATCH --mem 8192M", "#SBATCH --account=lab1 --gres=gpu:1"]),
        ("lsf", ["#BSUB -q long", "#BSUB -W 02:00"],
         ["#BSUB -q a100", "#BSUB -n 2", "#BSUB -P lab1", "#BSUB -gpu num=1"]),
        ("pbs", ["#PBS -q long", "#PBS -l walltime=02:00:00"],
         ["#PBS -q a100", "#PBS -P lab1 -l select=1:ncpus=2:mem=8192mb:ngpus=1 -l walltime=04:00:00"]),
    ],
)  # fmt: skip
def test_scripts_of_schedulers(tmp_path, profile, of_cpu, of_gpu):
    run = Nextflow(tmp_path)(
        "-C", ROOT / "nextflow.config", "run", ROOT / "tests/pipeline/check_scripts", "-profile", profile, *SITE,
        PATH=scheduler(tmp_path / "programs", profile),
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    heads = {}
    for file in tmp_path.glob("work/*/*/.command.run"):
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        heads[next(line.split("'")[1] for line in head if line.startswith("### name:"))] = head
    assert set(heads) == {"CPU", "GPU"}
    assert [line for line in of_cpu if line not in heads["CPU"]] == [], heads["CPU"]
    assert [line for line in of_gpu if line not in heads["GPU"]] == [], heads["GPU"]
    assert not [line for line in heads["CPU"] if "gpu" in line.lower()]


def test_a_scheduler_that_takes_no_job_ends_the_run(tmp_path):
    """Nextflow would wait for ever for a job that was refused and is ignored."""
    run = Nextflow(tmp_path)(
        "-C", ROOT / "nextflow.config", "run", ROOT / "tests/pipeline/check_scripts", "-profile", "slurm", *SITE,
        PATH=scheduler(tmp_path / "programs", "slurm", refuses=True),
    )  # fmt: skip
    assert run.code != 0
    assert "Failed to submit process to grid scheduler" in run.out + run.err
