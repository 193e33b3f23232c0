"""OUT/unlearning.json: what it says follows from the run, and what it must not say is not in it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import tiny_text

from kunbr_fast.cli import command as cli
from kunbr_fast.data.canonical import canonical
from kunbr_fast.data.commitment import commit
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.files.checksums import read_sealed, write_sealed
from kunbr_fast.files.model_digests import digests, files_of_model
from kunbr_fast.files.model_folder import side_files
from kunbr_fast.measures.evaluation import COLUMNS
from kunbr_fast.run import certificate
from kunbr_fast.run.certificate import NAME, Certificate, read_certificate, refresh, schema

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "--num-blocks 3 --top-k 1 --warmup-epochs 1 --block-epochs 1 --target letter --rtt-epochs 1 --rtt-lrs 1e-3 1e-2 "
    "--rtt-attacks full int8 --quiet --json"
).split()
VARYING = {"made", "seconds", "sets", "files"}  # time, salts, and what depends on them
RECORDS = [tiny_text.question(name) for name in tiny_text.NAMES]


def unlearn(workspace, out, *more, command="unlearn"):
    return [command, *tiny_text.inputs(workspace), "--out", str(out), *QUICK, *map(str, more)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def finished(workspace):
    """Do not write there: copy it."""
    assert cli.main(unlearn(workspace, workspace / "out")) == 0
    return workspace / "out"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def constant(found: Certificate):
    return {name: value for name, value in msgspec.to_builtins(found).items() if name not in VARYING}


# ---------------------------------------------------------------- what it says


def test_it_says_what_the_run_has_done(workspace, finished):
    found, report = read_certificate(finished / NAME), json.loads((finished / "report.json").read_text())
    assert (found.method, found.blocks) == ("KUnBR", [tuple(block) for block in report["blocks"]])
    assert found.settings == {
        "target": "letter", "num_blocks": 3, "top_k": 1, "warmup_epochs": 1, "block_epochs": 1,
        "rtt_lrs": [1e-3, 1e-2], "rtt_epochs": 1, "rtt_attacks": ["full", "int8"],
    }  # fmt: skip
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for folder, files in ((workspace / "model", found.original), (finished, found.result)):
        assert files == {name: sha256(folder / name) for name in names}
    assert found.unlearned is None and found.original["model.safetensors"] != found.result["model.safetensors"]
    assert found.files == {name: sha256(finished / name) for name in ("report.json", "run.yaml")}
    assert found.cautions == report["cautions"] and found.seconds == report["seconds"]
    assert len((finished / NAME).read_bytes()) < 8000
    for figure in found.figures:
        of = report["accuracy"][figure.model][figure.set]
        key = {"accuracy": "plain", "calibrated accuracy": "calibrated"}[figure.measure]
        assert (figure.value, figure.number) == (of[key], 12)
        assert figure.standard_error == pytest.approx((of[key] * (1 - of[key]) / 12) ** 0.5)
    assert len(found.figures) == 2 * 2 * 3
    rtt = RTTResult.from_dict(report["rtt"])
    assert [(a.attack, a.rates, a.after, a.before) for a in found.attacks] == [
        (name, rtt.rates(name), rtt.summary(name)["accuracy"], rtt.before) for name in ("full", "int8")
    ]
    assert found.attacks[0].number == 12 and found.attacks[1].says.startswith("weights rounded to 8 bits")


def test_an_attack_that_diverged_everywhere_was_tried():
    rows = [
        {"fold": fold, "lr": lr, "epoch": epoch, "plain": 0.5, "calibrated": None, "num_questions": 4}
        for fold in "ab"
        for lr in (1e-3, 1e-2)
        for epoch in (0, 1)
    ]
    rows += [{**row, "attack": "lora", "diverged": True} for row in rows if row["epoch"] == 0]
    rows += [{**row, "attack": "full", "lr": 0.5, "diverged": True} for row in rows[:1]]
    full, lora = certificate._attacks(RTTResult(rows).to_dict(), "rtt")
    assert (full.rates, full.diverged, full.after, full.number) == ([1e-3, 1e-2], [0.5], 0.5, 8)
    assert (lora.rates, lora.diverged, lora.after, lora.before) == ([], [1e-3, 1e-2], None, 0.5)


def test_a_given_m_u_and_questions_of_their_own_are_named(workspace, tmp_path):
    mine = shutil.copytree(workspace / "model", tmp_path / "mine")
    tiny_text.model(seed=1).save_pretrained(mine)
    questions = ["--forget-questions", workspace / "f0.jsonl", workspace / "f1.jsonl"]
    assert cli.main(unlearn(workspace, tmp_path / "out", "--unlearned", mine, *questions, "--no-rtt")) == 0
    found = read_certificate(tmp_path / "out" / NAME)
    assert found.unlearned["model.safetensors"] == sha256(mine / "model.safetensors") and found.attacks == []
    assert {name: each.records for name, each in found.sets.items()} == {
        "forget": 12, "retain": 12, "forget_questions": 12,
    }  # fmt: skip


def test_a_baseline_has_one(workspace, tmp_path):
    words = "--objective npo --epochs 1 --lr 1e-3 --target letter --no-rtt --quiet --json".split()
    assert cli.main(["baseline", *tiny_text.inputs(workspace), "--out", str(tmp_path / "out"), *words]) == 0
    found = read_certificate(tmp_path / "out" / NAME)
    assert (found.method, found.blocks, found.settings["top_k"]) == ("npo", [], 0)


def test_a_resumed_run_has_the_same_but_for_time_and_salts(workspace, finished, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kunbr_fast.run.stages.Stages.merge", stop)
        assert cli.main(unlearn(workspace, tmp_path / "out")) == 130
    assert cli.main(unlearn(workspace, tmp_path / "out", "--resume")) == 0
    first, second = (read_certificate(folder / NAME) for folder in (finished, tmp_path / "out"))
    assert constant(first) == constant(second)
    assert first.files["run.yaml"] == second.files["run.yaml"]
    assert first.sets.keys() == second.sets.keys() and first.seconds.keys() == second.seconds.keys()
    for name, records in (("forget", RECORDS[:12]), ("retain", RECORDS[12:])):
        salts = [each.sets[name].salt for each in (first, second)]
        assert salts[0] != salts[1]
        assert [commit(records, salt) for salt in salts] == [each.sets[name] for each in (first, second)]


def test_a_damaged_original_costs_the_certificate_and_no_result(workspace, tmp_path, caplog, monkeypatch):
    def broken(folder):
        raise ValueError("original/model.safetensors: gone")

    monkeypatch.setattr(certificate, "files_of_model", broken)
    assert cli.main(unlearn(workspace, tmp_path / "out", "--no-rtt")) == 0
    assert (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / NAME).exists()
    assert "unlearning.json is not written: original/model.safetensors: gone" in caplog.text


def test_a_page_is_at_the_end_and_one_that_cannot_be_made_costs_no_result(
    workspace, finished, tmp_path, caplog, monkeypatch
):
    text = (finished / "report.html").read_text()
    assert read_certificate(finished / NAME).result["model.safetensors"] in text and "When was Ada Ek born?" in text

    def broken(*args):
        raise ZeroDivisionError("in a chart")

    monkeypatch.setattr("kunbr_fast.pages.page.write_page", broken)
    assert cli.main(unlearn(workspace, tmp_path / "out", "--no-rtt")) == 0
    assert (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "report.html").exists()
    assert "report.html: the page could not be drawn: in a chart" in caplog.text


# ---------------------------------------------------------------- the commitment


def test_the_commitment_is_the_formula():
    salt = "ab" * 32
    leaves = sorted(hashlib.sha256(canonical(record).encode()).digest() for record in RECORDS)
    whole = hashlib.sha256(b"kunbr-fast set 1\0" + b"".join(leaves)).digest()
    truth = hashlib.scrypt(whole, salt=bytes.fromhex(salt), n=2**15, r=8, p=1, maxmem=2**27, dklen=32).hex()
    assert commit(RECORDS, salt).commitment == truth
    assert commit(RECORDS[::-1], salt).commitment == truth  # in any order
    for others in (
        RECORDS[:-1],
        [*RECORDS, RECORDS[0]],
        [*RECORDS[:-1], {**RECORDS[-1], "answer": (RECORDS[-1]["answer"] + 1) % 4}],
    ):
        assert commit(others, salt).commitment != truth
    assert commit(RECORDS).salt != commit(RECORDS).salt
    with pytest.raises(ValueError, match="no records to commit to"):
        commit([])


def test_nothing_of_a_record_is_in_it(tmp_path):
    """Neither text nor names of files, nor a digest of one record or of the set without its salt."""
    w = tiny_text.workspace(tmp_path)
    for number in range(2):
        (w / f"f{number}.jsonl").rename(w / f"secret-{number}.jsonl")
    words = [word.replace(f"{w}/f", f"{w}/secret-") for word in unlearn(w, w / "out")]
    assert cli.main(words) == 0
    text = (w / "out" / NAME).read_text()
    assert str(w) not in text and "secret" not in text and "f0" not in json.loads(text)["cautions"]
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    for record, name in zip(RECORDS, tiny_text.NAMES, strict=True):
        assert name not in text and record["question"] not in text and not any(p in text for p in name.split())
        assert str(tiny_text.years()[name]) not in strings
    hexes, texts = set(re.findall("[0-9a-f]{32,}", text)), list(map(canonical, RECORDS))
    for each in [*texts, *(json.dumps(record) for record in RECORDS), "".join(sorted(texts[:12]))]:
        for algorithm in ("sha256", "md5", "blake2b", "sha3_256"):
            assert hashlib.new(algorithm, each.encode()).hexdigest() not in hexes
    for name in ("secret-0", "secret-1", "r"):
        assert sha256(w / f"{name}.jsonl") not in hexes
    assert not any(
        each in text for each in json.loads((w / "out/report.json").read_text())["result"]["identity"].split("-")
    )


# ---------------------------------------------------------------- its schema


def valid(value, rule, whole):
    """Whether a value is as a JSON Schema says; of the keywords that ours has, any other one is an error."""
    known = {"$schema", "$id", "$defs", "title", "description"}
    for key, says in rule.items():
        if key in known:
            continue
        elif key == "$ref":
            right = valid(value, whole["$defs"][says.removeprefix("#/$defs/")], whole)
        elif key == "anyOf":
            right = any(valid(value, each, whole) for each in says)
        elif key == "enum":
            right = value in says
        elif key == "type":
            kinds = {"string": str, "object": dict, "array": list, "null": type(None), "integer": int}
            right = isinstance(value, kinds[says]) if says in kinds else isinstance(value, int | float)
            right = right and not isinstance(value, bool)
        elif key == "pattern":
            right = not isinstance(value, str) or re.search(says, value) is not None
        elif key == "minimum":
            right = not isinstance(value, int | float) or value >= says
        elif key == "required":
            right = not isinstance(value, dict) or value.keys() >= set(says)
        elif key == "properties":
            right = not isinstance(value, dict) or all(valid(value[k], r, whole) for k, r in says.items() if k in value)
        elif key == "additionalProperties":
            rest = (
                [v for k, v in value.items() if k not in rule.get("properties", {})] if isinstance(value, dict) else []
            )
            right = not rest if says is False else all(valid(v, says, whole) for v in rest)
        elif key == "prefixItems":
            right = not isinstance(value, list) or all(valid(v, r, whole) for v, r in zip(value, says))
        elif key == "items":
            rest = value[len(rule.get("prefixItems", ())) :] if isinstance(value, list) else []
            right = not rest if says is False else all(valid(v, says, whole) for v in rest)
        elif key in ("minItems", "maxItems"):
            right = not isinstance(value, list) or (len(value) >= says if key == "minItems" else len(value) <= says)
        else:
            raise KeyError(key)
        if not right:
            return False
    return True


def test_the_schema_in_docs_is_the_one_of_the_types():
    """To write it: python -c "import json; from kunbr_fast.run.certificate import schema; print(json.dumps(schema(),
    indent=2))" > docs/unlearning.schema.json"""
    assert json.loads((ROOT / "docs" / "unlearning.schema.json").read_text()) == schema()


def test_a_certificate_is_as_its_schema_says(finished):
    found, rule = json.loads((finished / NAME).read_text()), schema()
    assert valid(found, rule, rule) and found["$schema"] == rule["$id"]
    wrong = [{"format": 2}, {"made": "today"}, {"more": 1}, {"original": {"a": "00"}}, {"blocks": [[1]]}]
    wrong += [{"sets": {"forget": {**found["sets"]["forget"], **change}}} for change in ({"records": 0}, {"salt": "0"})]
    wrong += [{"figures": [{**found["figures"][0], "value": "0.5"}]}]
    for change in wrong:
        assert not valid({**found, **change}, rule, rule), change
    del found["sha256"]
    assert not valid(found, rule, rule)


# ---------------------------------------------------------------- an evaluation beside it


def evaluation(out, **changes):
    figure = {"measure": "probability", "title": "t", "group": "knowledge", "set": "forget", "model": "result"}
    figure |= {"value": 0.25, "standard_error": 0.5, "number": 12, "unit": "share", "known": "higher", "detail": {}}
    value = {
        "kunbr_fast": "0.1.0", "format": 1, "suite": "core", "settings": {},
        "models": {"result": {"path": str(out), "fingerprint": "x"}},
        "sets": {"forget": {"records": 12, "files": ["f0.jsonl"], "forms": {"own": 12}, "fingerprint": "y"}},
        "figures": [figure], "missing": [], "examples": [], "seconds": {},
        "lm_eval": {"mmlu": {"metric": "acc", "result": {"value": 0.3, "standard_error": 0.01}}},
    }  # fmt: skip
    write_sealed(out / "evaluation.json", value | changes)


def test_an_evaluation_is_added_with_the_sets_that_it_was_of(out):
    before = read_certificate(out / NAME)
    evaluation(out)
    assert refresh(out, {"forget": RECORDS[:12][::-1], "retain": RECORDS[:3], "holdout": RECORDS[3:6]})
    found = read_certificate(out / NAME)
    assert {name: getattr(found, name) for name in ("figures", "sets", "result")} == {
        name: getattr(before, name) for name in ("figures", "sets", "result")
    }
    assert found.evaluation.sets["forget"] == before.sets["forget"]  # everybody sees that it is the same set
    assert found.evaluation.sets["retain"] != before.sets["retain"]
    assert found.evaluation.sets["holdout"].records == 3
    assert [(f.measure, f.model, f.value) for f in found.evaluation.figures] == [
        ("probability", "result", 0.25), ("mmlu (acc)", "result", 0.3),
    ]  # fmt: skip
    assert found.files["evaluation.json"] == sha256(out / "evaluation.json")
    rule = schema()
    assert valid(json.loads((out / NAME).read_text()), rule, rule)
    evaluation(out, lm_eval=None)  # once more
    assert refresh(out) and read_certificate(out / NAME).evaluation.sets == {}


def test_an_evaluation_of_something_else_is_not_certified(workspace, out):
    text = (out / NAME).read_bytes()

    def refused(match):
        with pytest.raises(ValueError, match=match):
            refresh(out)
        assert (out / NAME).read_bytes() == text

    refused("evaluation.json: no such file")
    evaluation(out, models={"result": {"path": str(workspace / "model"), "fingerprint": "x"}})
    refused("evaluation.json: it is not of the model beside it")
    evaluation(out, models={"result": {"fingerprint": "x"}})  # of kf.evaluate, whose model was in memory
    refused("evaluation.json: it is not of the model beside it")
    evaluation(out)
    (out / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: changed since unlearning.json was made")
    (out / "tokenizer.json").unlink()
    refused("tokenizer.json: gone since unlearning.json was made")
    (out / NAME).write_bytes(text := text.replace(b"KUnBR", b"KUNBR"))
    refused("unlearning.json: damaged")
    (out / NAME).unlink()
    assert refresh(out) is False


# ---------------------------------------------------------------- whose it is


def test_new_results_take_it_away_and_what_is_edited_stays(workspace, out, tmp_path):
    evaluation(out)
    (out / "evaluation.csv").write_text(",".join(COLUMNS))
    page = (out / "report.html").read_text()
    assert cli.main(unlearn(workspace, out, "--overwrite", "--seed", 5, "--no-rtt")) == 0
    assert not (out / "evaluation.json").exists() and not (out / "evaluation.csv").exists()
    assert (out / "report.html").read_text() != page
    assert read_certificate(out / NAME).settings["seed"] == 5
    edited = (out / NAME).read_text().replace("KUnBR", "KUNBR")
    (out / NAME).write_text(edited)
    assert cli.main(unlearn(workspace, out, "--overwrite", "--no-rtt")) == 2
    assert (out / NAME).read_text() == edited


def test_a_model_written_in_the_form_of_a_result_takes_no_certificate_over(out):
    evaluation(out)
    assert {NAME, "evaluation.json", "report.json"} & side_files(out).keys() == set()
    assert "config.json" in side_files(out)


def test_read_certificate_takes_no_other_document(out, tmp_path):
    values = read_sealed(out / NAME, "x")
    for change, message in (
        ({"format": 2}, "no certificate of format 1"),
        ({"more": 1}, "more"),
        ({"sets": {"forget": {**values["sets"]["forget"], "derivation": "md5"}}}, "md5"),
    ):
        write_sealed(tmp_path / NAME, values | change)
        with pytest.raises(ValueError, match=message):
            read_certificate(tmp_path / NAME)


def test_files_behind_links_are_those_of_the_hubs_cache(workspace, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (workspace / "model").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    linked = digests(files_of_model(tmp_path / "model"))
    assert linked == digests(files_of_model(workspace / "model"), "not so large that there is a bar")
