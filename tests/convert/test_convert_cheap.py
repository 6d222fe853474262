"""Heads with a draft vocabulary, with the base model's projection, and in K-quants: what the converter writes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from entmtp.common.errors import ConvertError
from entmtp.convert import convert, inspect_heads, main
from entmtp.convert.draft_vocab import STEP, choose_vocab, make_vocab, read_text, tokenize, write_sample
from entmtp.models.assets import assets
from entmtp.models.base import read_base
from helpers.checkpoints import (
    N_EMBD,
    N_VOCAB,
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    read_heads,
    tiny_base,
    write_checkpoint,
)
from helpers.settings import prompts

IDS = [40, 3, 7, 0, 47, 12]
LAYOUTS = {
    "medusa": (medusa_state(3, 2), medusa_config(3, 2)),
    "hydra": (hydra_state(3, 2), hydra_config(3, 2)),
    "ungrounded": (hydra_state(3, 2, grounded=False), hydra_config(3, 2, grounded=False)),
    "hydra++": (hydra_state(3, prefix=True), hydra_config(3, prefix=True)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(params=LAYOUTS)
def checkpoint(request, tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", *LAYOUTS[request.param])


def projection(path):
    return np.array(next(t.data for t in GGUFReader(path).tensors if t.name == "output.weight"))


# draft vocabularies and shared projections


def test_draft_vocab_keeps_rows(tmp_path, checkpoint, base):
    full = read_heads(convert(checkpoint, base, tmp_path / "full.gguf").outfile)
    done = convert(checkpoint, base, tmp_path / "h.gguf", draft_vocab=IDS)
    heads = read_heads(done.outfile)
    ids = sorted(IDS)
    np.testing.assert_array_equal(heads.tensors.pop("d2t"), ids)
    assert set(heads.tensors) == set(full.tensors)
    for name, array in full.tensors.items():
        np.testing.assert_array_equal(heads.tensors[name], array[ids] if ".output." in name else array)
    assert heads.keys.items() == full.keys.items()
    inspect_heads(done.outfile)


@pytest.mark.parametrize("ids", [None, IDS])
def test_shared_projection_is_left_out(tmp_path, checkpoint, base, ids, capsys):
    full = read_heads(convert(checkpoint, base, tmp_path / "full.gguf", draft_vocab=ids).outfile)
    done = convert(checkpoint, base, tmp_path / "h.gguf", draft_vocab=ids, share_lm_head=True)
    heads = read_heads(done.outfile)
    assert heads.keys[f"{done.arch}.shared_output"] is True
    assert set(full.tensors) - set(heads.tensors) == {f"head.{i}.output.weight" for i in range(3)}
    for name, array in heads.tensors.items():
        np.testing.assert_array_equal(array, full.tensors[name])
    inspect_heads(done.outfile)
    # random projections are not the base's
    assert any("not trained to share" in note for note in done.notes)
    assert "note: these heads have projections of their own" in capsys.readouterr().err


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_equal_projections_are_stored_once(tmp_path, base, kind, ids, capsys):
    state, config = LAYOUTS[kind]
    names = [n for n, a in state.items() if a.shape == (N_VOCAB, N_EMBD) and "embed" not in n]
    assert len(names) == 3
    one = state | dict.fromkeys(names, state[names[0]])
    full = read_heads(
        convert(write_checkpoint(tmp_path / "a", state, config), base, tmp_path / "a.gguf").outfile
    )
    folder = write_checkpoint(tmp_path / "b", one, config)
    out = convert(folder, base, tmp_path / "b.gguf", draft_vocab=ids).outfile
    heads = read_heads(out)
    first = full.tensors["head.0.output.weight"]
    np.testing.assert_array_equal(
        heads.tensors["output.weight"], first if ids is None else first[sorted(ids)]
    )
    assert not any(name.endswith(".output.weight") for name in heads.tensors)
    inspect_heads(out)
    assert main(["--inspect", str(out)]) == 0
    assert "one projection for all heads" in capsys.readouterr().out
    # all but one equal: each is stored
    almost = one | {names[2]: state[names[2]]}
    heads = read_heads(
        convert(write_checkpoint(tmp_path / "c", almost, config), base, tmp_path / "c.gguf").outfile
    )
    assert {f"head.{i}.output.weight" for i in range(3)} <= set(heads.tensors)
    # and left out with the base's
    out = convert(folder, base, tmp_path / "d.gguf", share_lm_head=True).outfile
    assert not any(name.split(".")[-2:] == ["output", "weight"] for name in read_heads(out).tensors)


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_no_note_about_heads_trained_to_share(tmp_path, type):
    """Their checkpoint holds the base's projection before it was quantised."""
    plain = projection(tiny_base(tmp_path / "f32.gguf"))
    base = tiny_base(tmp_path / "base.gguf", type=GGMLQuantizationType[type])
    state = medusa_state(2)
    for i in range(2):
        state[f"{i}.1.weight"] = plain
    folder = write_checkpoint(tmp_path / "c", state, medusa_config(2))
    assert convert(folder, base, tmp_path / "h.gguf", share_lm_head=True).notes == ()
    folder = write_checkpoint(tmp_path / "c", medusa_state(2), medusa_config(2))
    assert "not trained to share" in convert(folder, base, tmp_path / "h.gguf", share_lm_head=True).notes[0]


def test_checkpoints_without_projections(tmp_path, base):
    """As in the first Medusa release, whose heads share the base's."""
    state = {name: array for name, array in medusa_state(2, 1).items() if "linear" in name}
    folder = write_checkpoint(tmp_path / "c", state, medusa_config(2, 1))
    done = convert(folder, base, tmp_path / "h.gguf", share_lm_head=True)
    assert (done.n_heads, done.notes) == (2, ())
    assert set(read_heads(done.outfile).tensors) == {
        f"head.{i}.blk.0.{kind}" for i in range(2) for kind in ("weight", "bias")
    }
    with pytest.raises(ConvertError, match="--share-lm-head"):
        convert(folder, base, tmp_path / "none.gguf")
    assert not (tmp_path / "none.gguf").exists()


BAD_VOCABULARIES = {
    "empty": ([], "empty"),
    "below": ([1, -1], "token -1"),
    "beyond": ([0, 1, N_VOCAB], f"token {N_VOCAB},"),
    "twice": ([5, 1, 5], "token 5 twice"),
    "too large": (N_VOCAB + 1, "cannot be"),
    "none": (0, "cannot be"),
    "unknown word": ("most", "'most'"),
}


@pytest.mark.parametrize("case", BAD_VOCABULARIES)
def test_draft_vocabularies_that_cannot_be(tmp_path, base, case):
    vocab, words = BAD_VOCABULARIES[case]
    folder = write_checkpoint(tmp_path / "c", *LAYOUTS["medusa"])
    with pytest.raises(ConvertError, match=words):
        convert(folder, base, tmp_path / "h.gguf", draft_vocab=vocab)
    assert not (tmp_path / "h.gguf").exists()


def test_provenance(tmp_path, base, capsys):
    folder = write_checkpoint(tmp_path / "c", *LAYOUTS["medusa"])
    facts = {"data": "prompts.jsonl", "steps": 4000, "loss.final": 1.5, "resumed": True, "note": ""}
    out = convert(folder, base, tmp_path / "h.gguf", provenance=facts).outfile
    keys = inspect_heads(out).keys
    assert {k.removeprefix("entmtp.train."): v for k, v in keys.items() if ".train." in k} == facts
    assert main(["--inspect", str(out)]) == 0
    assert "entmtp.train.steps" in capsys.readouterr().out
    for bad, words in (({"Base Model": 1}, "Base Model"), ({"x": [1]}, "x is a list")):
        with pytest.raises(ConvertError, match=words):
            convert(folder, base, tmp_path / "bad.gguf", provenance=bad)  # type: ignore[arg-type]
    assert not (tmp_path / "bad.gguf").exists()


# K-quants


@pytest.mark.parametrize(("outtype", "error"), [("q6_k", 0.02), ("q5_k", 0.04), ("q4_k", 0.1)])
def test_k_quants(tmp_path, outtype, error):
    base = tiny_base(tmp_path / "base.gguf", n_embd=256)
    state = hydra_state(2, prefix=True, n_embd=256, n_ff=64)
    folder = write_checkpoint(tmp_path / "c", state, hydra_config(2, prefix=True))
    done = convert(folder, base, tmp_path / "h.gguf", outtype)
    heads = read_heads(done.outfile)
    exact = read_heads(convert(folder, base, tmp_path / "f32.gguf", "f32").outfile)
    for name, array in heads.tensors.items():
        off = np.linalg.norm(array - exact.tensors[name]) / np.linalg.norm(exact.tensors[name])
        assert off < error, name
    # ffn_down has rows of 64
    other = "Q4_0" if outtype == "q4_k" else "Q8_0"
    assert heads.types["prefix.ffn_down.weight"] == other
    assert {heads.types[f"head.{i}.output.weight"] for i in range(2)} == {outtype.upper()}
    assert heads.types["head.0.blk.0.bias"] == "F32"
    assert done.notes == (
        f"1 of 13 matrices have rows that are no multiple of 256 long and are stored as {other.lower()}",
    )
    inspect_heads(done.outfile)


@pytest.mark.parametrize("outtype", ["q6_k", "q5_k", "q4_k"])
def test_values_too_large_for_k_quants(tmp_path, outtype):
    base = tiny_base(tmp_path / "base.gguf", n_embd=256)
    state = medusa_state(1, n_embd=256)
    folder = write_checkpoint(tmp_path / "c", state, medusa_config(1))
    state["0.1.weight"][3, 5] = 1e9
    write_checkpoint(folder, state, medusa_config(1))
    with pytest.raises(ConvertError, match="too large for " + outtype):
        convert(folder, base, tmp_path / "h.gguf", outtype)
    # what a block's scale in float16 can hold, see the layouts of ggml's K-quants
    most = 65504.0 * {"q6_k": 127 * 32, "q5_k": 63 * 31, "q4_k": 63 * 15}[outtype]
    state["0.1.weight"][3, 5] = 1.001 * most
    write_checkpoint(folder, state, medusa_config(1))
    with pytest.raises(ConvertError, match="too large for " + outtype):
        convert(folder, base, tmp_path / "h.gguf", outtype)
    state["0.1.weight"][3, 5] = 0.9 * most
    write_checkpoint(folder, state, medusa_config(1))
    heads = read_heads(convert(folder, base, tmp_path / "h.gguf", outtype).outfile)
    assert np.isfinite(heads.tensors["head.0.output.weight"]).all()
    state["0.1.weight"][3, 5] = 1e6  # large, and can be held
    write_checkpoint(folder, state, medusa_config(1))
    heads = read_heads(convert(folder, base, tmp_path / "h.gguf", outtype).outfile)
    assert np.isfinite(heads.tensors["head.0.output.weight"]).all()
    assert heads.tensors["head.0.output.weight"][3, 5] == pytest.approx(1e6, rel=0.05)


# the choice of a vocabulary


def test_frequent_tokens_are_chosen():
    rng = np.random.default_rng(0)
    n_vocab = 4000
    p = 1.0 / np.arange(1, n_vocab + 1) ** 1.5  # Zipf, over shuffled ids
    ids = rng.permutation(n_vocab)
    text = ids[rng.choice(n_vocab, 60000, p=p / p.sum())]
    unseen = ids[rng.choice(n_vocab, 60000, p=p / p.sum())]

    chosen = choose_vocab(text, n_vocab, 512, "a text")
    assert len(chosen.tokens) == 512 and (np.diff(chosen.tokens) > 0).all()
    assert set(ids[:100]) <= set(chosen.tokens)
    # the stated coverage is that of text which was not seen
    assert chosen.coverage == pytest.approx(np.isin(unseen, chosen.tokens).mean(), abs=0.01)

    auto = choose_vocab(text, n_vocab, None, "a text")
    assert len(auto.tokens) % STEP == 0
    assert auto.coverage >= 0.99 > choose_vocab(text, n_vocab, len(auto.tokens) - STEP, "a text").coverage
    assert choose_vocab(np.arange(n_vocab), n_vocab, None, "").tokens.tolist() == list(range(n_vocab))
    with pytest.raises(ConvertError, match="at least 512"):
        choose_vocab(text[:511], n_vocab, 256, "a text")


def test_each_half_of_the_text_is_foretold_by_the_other():
    """Four pieces of 256 tokens, one token in each: tokens 0 and 2 against 1 and 3."""
    text = np.repeat([0, 1, 2, 3], 256)
    # by their half 0, 2, then the unseen ones in order: 1, 3; by the other 1, 3, 0, 2
    for size, coverage in ((1, 0.0), (2, 0.0), (3, 0.5), (4, 1.0)):
        chosen = choose_vocab(text, 8, size, "")
        assert chosen.tokens.tolist() == list(range(size)) and chosen.coverage == coverage


def test_as_many_tokens_as_it_takes_and_no_step_more():
    """Token STEP - 1 is frequent in one half alone, so coverage jumps with the last token of a step."""
    rare = np.arange(STEP)
    first = np.concatenate([rare, rare[:-1], [0]])  # every token twice, but the last one
    second = np.full(256, STEP - 1)
    text = np.concatenate([first[:256], second, first[256:512], second])
    assert len(choose_vocab(text, 4 * STEP, None, "").tokens) == STEP


def test_vocabularies_by_a_text(tmp_path):
    base = read_base(assets() / "demo-base-q8_0.gguf")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prompts()), encoding="utf-8")
    whole = make_vocab(base, base.n_vocab, [text])
    assert whole.tokens.tolist() == list(range(base.n_vocab))
    assert (whole.coverage, whole.source) == (1.0, "text.txt")
    with pytest.raises(ConvertError, match=f"of {base.n_vocab + 1} tokens cannot be"):
        make_vocab(base, base.n_vocab + 1, [text])
    with pytest.raises(ConvertError, match=r"text\.txt: its vocabulary cannot be loaded"):
        list(tokenize(text, ["a"]))


def test_tokens_of_texts_and_prompts(tmp_path, load):
    base = read_base(assets() / "demo-base-q8_0.gguf")
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "It was cold."}\n', encoding="utf-8")
    tokens = read_text(base, [tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert load().detokenize(tokens) == b"def f(x):\n    return x\nIt was cold."
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConvertError, match="no UTF-8 text"):
        read_text(base, [tmp_path / "c.txt"])
    (tmp_path / "d.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(ConvertError, match="line 1"):
        read_text(base, [tmp_path / "d.jsonl"])


def test_the_base_writes_the_same_text_again():
    base = read_base(assets() / "demo-base-q8_0.gguf")
    seen: list[tuple[str, int, int]] = []
    tokens = write_sample(base, lambda *step: seen.append(step), n_tokens=600)
    assert 300 < len(tokens) <= 768 and len(set(tokens)) > 100
    assert [step[1:] for step in seen] == [(256, 600), (512, 600), (600, 600)]
    assert write_sample(base, n_tokens=600) == tokens


def test_a_base_that_cannot_run(tmp_path, base):
    broken = tmp_path / "base.gguf"
    broken.write_bytes(base.read_bytes())
    model = read_base(broken)
    broken.write_bytes(base.read_bytes()[:-4000])
    with pytest.raises(ConvertError, match="cannot be loaded"):
        make_vocab(model, 16)


# the command


def test_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prompts()), encoding="utf-8")
    out = tmp_path / "h.gguf"
    command = [
        str(assets() / "medusa"),
        "--base",
        str(assets() / "demo-base-q8_0.gguf"),
        "--outfile",
        str(out),
    ]
    options = ["--draft-vocab", "1024", "--draft-text", str(text), "--share-lm-head", "--outtype", "q4_k"]
    assert main([*command, *options]) == 0
    err = capsys.readouterr().err
    assert "draft vocabulary: 1,024 of 4,096 tokens, by text.txt; they are " in err
    assert "not trained to share" in err
    assert main(["--inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "drafts 1,024 of 4,096 tokens with the base model's projection" in shown
    assert "d2t" in shown and "medusa.shared_output" in shown

    assert main([*command, "--draft-vocab", "none", "--outtype", "q4_k"]) == 0
    assert f"{out}: 4 medusa heads, q4_k, {out.stat().st_size / 1e6:.1f} MB" in capsys.readouterr().out
    assert "d2t" not in read_heads(out).tensors
    assert main(["--inspect", str(out)]) == 0
    assert "drafts all 4,096 tokens with projections of their own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft-text", "x.txt"], "--draft-text goes with --draft-vocab"),
        (["--draft-vocab", "0"], "is not a number of tokens"),
        (["--draft-vocab", "-5"], "is not a number of tokens"),
        (["--draft-vocab", "many"], "is not a number of tokens"),
        (["--inspect", "h.gguf", "--share-lm-head"], "--inspect takes"),
    ],
)
def test_usage(tmp_path, base, options, words, capsys):
    command = [] if "--inspect" in options else [str(tmp_path), "--base", str(base)]
    with pytest.raises(SystemExit) as stop:
        main([*command, *options])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_text(tmp_path, base, capsys):
    folder = write_checkpoint(tmp_path / "c", *LAYOUTS["medusa"])
    missing = tmp_path / "missing.txt"
    command = [str(folder), "--base", str(base), "--outfile", str(tmp_path / "h.gguf")]
    assert main([*command, "--draft-vocab", "8", "--draft-text", str(missing)]) == 1
    assert str(missing) in capsys.readouterr().err
    assert not (tmp_path / "h.gguf").exists()


def test_widths_agree():
    assert N_EMBD % 32 == 0 and N_EMBD % 256 != 0  # the tiny base's matrices have no K-quants
