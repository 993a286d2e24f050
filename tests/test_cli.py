import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import vmamba
from vmamba.cli import main, make_parser
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.complexity import profile
from vmamba.models.registry import ENTRIES
from vmamba.models.variants import VARIANTS
from vmamba.tasks import settings_of

CONFIGS = Path(__file__).parents[1] / "configs"
KWARGS = {"depths": [1, 1, 1], "dims": [8, 12, 16]}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A classifier that answers by brightness: dark, grey or bright."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = vmamba.create_model("vmamba_femto_s2", num_classes=3, in_chans=3, **KWARGS)
    metadata = {
        "class_names": ["dark", "grey", "bright"],
        "img_size": [16, 16],
        "model_kwargs": KWARGS,
        "crop_pct": 1.0,
    }
    save_checkpoint(network, tmp_path / "model.safetensors", metadata)
    for name, value in (("a", 0), ("b", 128), ("sub/c", 255)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / f"{name}.png")
    return network.eval()


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def recipe_of(*arguments):
    settings = settings_of("train", arguments)
    parser = make_parser("train", settings)
    given = parser.instantiate(parser.parse_args(["train", *arguments])).train
    return settings(**{name: given[name] for name in settings.__dataclass_fields__})


def test_predict_as_json_csv_and_table(model, capsys):
    code, out, err = run(capsys, "predict", "a.png", "sub", "--checkpoint", "model.safetensors", "--format", "json")
    assert code == 0
    assert "predicting with model.safetensors" in err
    results = json.loads(out)
    assert [result["file"] for result in results] == ["a.png", "sub/c.png"]
    pixels = torch.full((1, 3, 16, 16), 1.0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = model((pixels - mean) / std).softmax(1)[0]
    scores = {score["name"]: score["confidence"] for score in results[1]["classes"]}
    assert scores == pytest.approx(dict(zip(("dark", "grey", "bright"), expected.tolist(), strict=True)), abs=1e-4)
    assert [s["confidence"] for s in results[1]["classes"]] == sorted(scores.values(), reverse=True)

    arguments = ("predict", "a.png", "b.png", "--checkpoint", "model.safetensors", "--topk", "2")
    code, out, _ = run(capsys, *arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["file"], row["rank"]) for row in rows] == [
        ("a.png", "1"),
        ("a.png", "2"),
        ("b.png", "1"),
        ("b.png", "2"),
    ]
    code, out, _ = run(capsys, *arguments)
    assert out.splitlines()[0].split() == ["file", "rank", "class", "index", "confidence"]
    assert len(out.splitlines()) == 5
    code, out, _ = run(capsys, *arguments, "--output", "table.txt")
    assert out == ""
    assert Path("table.txt").read_text().count("%") == 4


def test_predict_reports_bad_files_and_goes_on(model, capsys):
    Path("bad.jpg").write_bytes(b"")
    code, out, err = run(
        capsys,
        "predict",
        "bad.jpg",
        "missing.png",
        "*.gif",
        "a.png",
        "--checkpoint",
        "model.safetensors",
        "--format",
        "json",
    )
    assert code == 1
    results = json.loads(out)
    assert results[0] == {"file": "bad.jpg", "error": "bad.jpg: the file is empty (0 bytes)"}
    assert results[1]["file"] == "a.png"
    assert len(results[1]["classes"]) == 3
    assert "missing.png: no such file" in err
    assert "*.gif: no image files" in err
    assert "bad.jpg: the file is empty" in err
    assert run(capsys, "predict", "missing.png")[0] == 1
    code, _, err = run(capsys, "predict", "a.png")
    assert code == 1
    assert "runs/latest/model.safetensors does not exist" in err
    code, _, err = run(capsys, "predict", "a.png", "--checkpoint", "a.png")
    assert code == 1
    assert err.startswith("vmamba predict: a.png")
    assert "Traceback" not in err


@pytest.mark.parametrize(("arguments", "words"), [
    (("predict", "a.png", "--topk", "-1"), "topk is -1; expected 1 or more"),
    (("predict", "a.png", "--batch_size", "0"), "batch_size is 0; expected 1 or more"),
    (("predict", "a.png", "--threshold", "30"), "threshold is 30.0; expected 0 to 1"),
    (("predict", "a.png", "--window", "0"), "window is 0; expected 32 or more"),
    (("predict", "a.png", "--workers", "-1"), "workers is -1; expected 0 or more"),
    (("predict", "a.png", "--img_size", "4"), "img_size is 4×4; the model needs at least 8 a side"),
    (("predict", "a.png", "--checkpoint", "model.safetensors", "--pretrained", "vmamba_nano"), "both a file, model"),
    (("info", "vmamba_femto_s2", "--img_size", "1"), "img_size is 1: "),
    (("info", "vmamba_femto_s2", "--img_size", "0"), "img_size is 0: "),
    (("export", "model.safetensors", "--output", "model.safetensors"), "would be taken for another kind of file"),
    (("export", "model.safetensors", "--output", "new.onnx", "--format", "torch"), "name it *.pt2, or choose a format"),
])  # fmt: skip
def test_settings_that_cannot_be_are_told_in_a_line(model, capsys, arguments, words):
    if arguments[0] == "predict" and "--checkpoint" not in arguments:
        arguments = (*arguments, "--checkpoint", "model.safetensors")
    before = Path("model.safetensors").read_bytes()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert Path("model.safetensors").read_bytes() == before


def test_models_lists_every_model_with_its_cost(capsys):
    rows = {row["name"]: row for row in json.loads(run(capsys, "models", "--format", "json")[1])}
    assert list(rows) == list(ENTRIES)
    tiny = rows["vmamba_tiny_s1l8"]
    assert tiny["params"] == 30_249_064
    assert tiny["top1"] == 82.6
    assert tiny["gflops"] == 4.9
    femto = vmamba.create_model("vmamba_femto_s2")
    assert rows["vmamba_femto_s2"]["params"] == sum(p.numel() for p in femto.parameters())
    upernet, heads = (rows[f"upernet_vmamba_{name}"] for name in ("tiny_s1l8", "femto_s2"))
    assert (upernet["task"], upernet["params"], upernet["gflops"]) == ("segmentation", 61_902_572, 949)
    assert upernet["published"] == {"mIoU": 47.9, "mIoU multi-scale": 48.8}
    assert (upernet["img_size"], upernet["top1"], heads["published"], heads["url"]) == ([512, 2048], None, {}, None)
    assert heads["params"] == sum(p.numel() for p in vmamba.create_model("upernet_vmamba_femto_s2").parameters())

    out = run(capsys, "models")[1].splitlines()
    assert len(out) == len(ENTRIES) + 3
    assert out[1].split()[:3] == ["vmamba_tiny_s1l8", "30.2", "M"]
    assert [line.split()[0] for line in out if " model " in line] == ["classification", "segmentation", "detection"]
    (line,) = (line for line in out if line.startswith("maskrcnn_vmamba_tiny_s1l8_3x "))
    assert " ".join(line.split()) == "maskrcnn_vmamba_tiny_s1l8_3x 49.8 M 271.00 G 800×1280 48.8 % 43.7 %"
    (line,) = (line for line in out if line.startswith("upernet_vmamba_nano "))
    assert line.split()[-2:] == ["–", "–"]


def test_info_of_a_variant_and_of_a_file(model, capsys):
    code, out, _ = run(capsys, "info", "vmamba_femto_s2", "--img_size", "32", "--layers", "true", "--format", "json")
    info = json.loads(out)
    assert info["img_size"] == [32, 32]
    assert info["params"] == sum(p["params"] for p in info["parts"])
    assert info["params"] == sum(layer["params"] for layer in info["layers"])
    out = run(capsys, "info", "model.safetensors")[1]
    assert "dark grey bright" in out
    assert "16 16" in out
    assert "2×2×16" in out
    out = run(capsys, "info", "maskrcnn_vmamba_femto", "--img_size", "64", "--format", "json")[1]
    info = json.loads(out)
    assert (info["task"], info["backbone"], info["release"]) == ("detection", "vmamba_femto", None)
    assert info["params"] == sum(p["params"] for p in info["parts"]) == 19_490_576
    out = run(capsys, "info", "upernet_vmamba_tiny_s1l8", "--img_size", "64")[1]
    assert "mIoU 47.9, mIoU multi-scale 48.8, url https://github.com/" in out
    assert "61,902,572" in out
    code, _, err = run(capsys, "info", "nothing")
    assert code == 1
    assert "neither a variant nor a file" in err


def test_train_validate_and_predict_from_the_command_line(tmp_path, monkeypatch, capsys):
    from tasks.small import make_images

    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")
    (tmp_path / "base.yaml").write_text(
        "optim: {epochs: 9, warmup_epochs: 0, lr: 0.01, ema_decay: 0}\ndata: {img_size: 16}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nmodel: {name: vmamba_femto_s2, kwargs: {depths: [1, 1, 1], dims: [8, 12, 16]}}\n"
        "optim: {epochs: 1}\ndata: {batch_size: 4, workers: 0}\ntrainer: {accelerator: cpu}\n"
    )
    code, out, err = run(capsys, "train", "--config", "mine.yaml", "--data.root", "images", "--run", "runs/mine")
    assert code == 0
    assert out == ""
    assert "epoch   1/1  training loss" in err
    assert "validation loss" in err
    assert "the run is in runs/mine" in err
    code, out, err = run(capsys, "train", "--config", "mine.yaml", "--data.root", "images", "--run", "runs/mine")
    assert code == 1
    assert err.startswith("vmamba train: runs/mine already holds a run")
    code, _, _ = run(capsys, "train", "--config", "runs/mine/config.yaml", "--overwrite", "true")
    assert code == 0
    code, out, _ = run(capsys, "validate", "--trainer.accelerator", "cpu")
    assert code == 0
    assert out.startswith("9 images: top-1 ")
    assert json.loads(Path("runs/mine/metrics.json").read_text())["images"] == 9
    code, out, err = run(capsys, "predict", "images/val/red", "--format", "json")
    assert code == 0
    assert len(json.loads(out)) == 3
    assert "predicting with runs/latest/model.safetensors" in err
    code, _, err = run(capsys, "train", "--config", "mine.yaml", "--data.root", "nowhere", "--run", "runs/b")
    assert code == 1
    assert "nowhere: no such folder" in err
    assert not Path("runs/b").exists()


def test_wrong_usage_exits_with_2_and_says_what(capsys):
    for arguments, message in (
        (["train", "--optim.lr", "fast"], "optim.lr"),
        (["train", "--optim.rate", "1"], "optim.rate"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["trian"], "trian"),
        (["predict"], "paths"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


def test_wrong_usage_names_the_settings_that_are_meant(capsys):
    for arguments, message in (
        (["train", "--dataset", "hfds/x"], "for --dataset there is --data.dataset\n"),
        (["train", "--data", "folder"], "for --data there is --data.root, --data.val_root, --data.dataset, ...\n"),
        (["validate", "--img_size=64", "--nothing"], "for --img_size there is --data.img_size\n"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err.endswith(message)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate for a global batch of lr_batch images." in out
    assert "Recompute activations in the backward pass" in out
    assert "vmamba train --config configs/imagenet" in out
    with pytest.raises(SystemExit):
        main(["train", "--config", str(CONFIGS / "imagenet/vmamba_tiny_s1l8.yaml"), "--print_config"])
    assert "drop_path_rate: 0.2" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_complete_and_consistent(path):
    recipe_of("--config", str(path)).check()


def test_published_recipes_are_as_published():
    for name, variant in VARIANTS.items():
        if variant.release is None:
            continue
        recipe = recipe_of("--config", str(CONFIGS / f"imagenet/{name}.yaml"))
        o, a, d = recipe.optim, recipe.augment, recipe.data
        assert (recipe.model.name, recipe.model.drop_path_rate) == (name, variant.drop_path_rate)
        assert (o.epochs, o.warmup_epochs, o.lr, o.min_lr, o.lr_batch) == (300, 20, 1e-3, 1e-5, 1024)
        assert (o.optimizer, tuple(o.betas), o.weight_decay, o.clip_grad, o.ema_decay) == (
            "adamw",
            (0.9, 0.999),
            0.05,
            5.0,
            0.9999,
        )
        assert (a.mixup, a.cutmix, a.random_erasing, a.color_jitter, a.label_smoothing) == (0.8, 1.0, 0.25, 0.4, 0.1)
        assert (a.rand_augment, d.img_size, d.interpolation, d.crop_pct) == (
            "rand-m9-mstd0.5-inc1",
            224,
            "bicubic",
            0.875,
        )
        assert str(recipe.folder) == f"runs/{name}"


def test_batches_without_pyarrow_name_the_extra(tmp_path):
    code = "import sys, vmamba.cli; sys.modules['pyarrow'] = None; sys.exit(vmamba.cli.main(sys.argv[1:]))"
    command = ["batch", str(tmp_path), "--checkpoint", "model.safetensors", "--output", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert result.returncode == 1
    assert "many images need more packages" in result.stderr
    assert 'pip install "vmamba[scale]"' in result.stderr


def test_only_training_needs_lightning():
    code = (
        "import sys, vmamba.cli; sys.modules['lightning'] = None\n"
        "assert not {'matplotlib', 'torchmetrics', 'rich'} & set(sys.modules)\n"
        "assert vmamba.cli.main(['models']) == 0\n"
        "assert vmamba.cli.main(['train', '--data.root', '/']) == 1"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'pip install "vmamba[train]"' in result.stderr


# --- terminals, pipes, disks and names as they are -------------------------------------------------------------------


def shell(line, folder, **environment):
    """Run a line in which `vmamba` is our command."""
    text = f'vmamba() {{ "$PYTHON" -m vmamba.cli "$@"; }}; {line}'
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_reader_that_goes_away_ends_the_command_quietly(model, tmp_path):
    for command in (
        "vmamba info model.safetensors --layers true",
        "vmamba predict a.png --checkpoint model.safetensors",
    ):
        done = shell(f"{command} 2> errors | true; echo ${{PIPESTATUS[0]}}", tmp_path)
        assert done.stdout == "141\n"
        assert "Traceback" not in (errors := Path("errors").read_text())
        assert "BrokenPipe" not in errors
        assert "Exception" not in errors


def test_output_that_cannot_be_written_is_told_in_a_line(model, tmp_path):
    predict = "vmamba predict a.png --checkpoint model.safetensors"
    for unbuffered in ("", "1"):
        done = shell(f"{predict} > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 1
        assert done.stderr.splitlines()[1:] == ["vmamba predict: [Errno 28] No space left on device"]
    done = shell(f"{predict} --output no/such/folder/table.txt", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "vmamba predict: no/such/folder is no folder; make it first\n"  # before anything is computed
    done = shell(f"{predict} >&- 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_names_that_are_not_utf8_and_terminals_that_are_not(model, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    Path("a.png").rename(name)
    code, out, _ = run(capsys, "predict", name, "--checkpoint", "model.safetensors", "--format", "json")
    assert code == 0
    assert json.loads(out)[0]["file"] == "caf\\xe9.png"
    for form in ("csv", "table"):
        assert "caf\\xe9.png" in run(capsys, "predict", name, "--checkpoint", "model.safetensors", "--format", form)[1]
    code, _, err = run(capsys, "info", name)
    assert code == 1
    assert "caf\\xe9.png" in err
    assert run(capsys, "info", os.fsdecode(b"nothing\xe9"))[2].startswith("vmamba info: nothing\\xe9")
    done = shell("vmamba info model.safetensors", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "2\\xd72\\xd716" in done.stdout  # ×


def test_an_interrupt_is_told_in_a_line(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("vmamba.cli.commands.models", interrupted)
    assert run(capsys, "models") == (130, "", "vmamba models: stopped\n")


def test_info_of_a_model_of_timms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = timm.create_model("resnet10t", num_classes=3)
    metadata = {"variant": "resnet10t", "class_names": ["a", "b", "c"], "img_size": [64, 96]}
    save_checkpoint(network, "resnet.safetensors", metadata)
    code, out, err = run(capsys, "info", "resnet.safetensors", "--format", "json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    assert info["params"] == sum(p.numel() for p in network.parameters())
    assert info["img_size"] == [64, 96]
    assert info["flops"] == profile(network, (64, 96)).flops > 1e7
    assert "resnet10t" in run(capsys, "info", "resnet.safetensors")[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"vmamba {vmamba.__version__}\n"
