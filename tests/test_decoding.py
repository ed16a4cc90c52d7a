"""decoding.py: batches, what ends a row, memory, continuous batching.

python -m pytest tests/test_decoding.py
"""

import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import french_rows
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer

import decoding
import infer
import packing
from exit_codes import LoneError
from infer import Decoding
from modeling import load_base
from prompting import Ends, Prompt, load_tokenizer

CPU = torch.device("cpu")
ARTICLES = [row["text"] for row in french_rows(9, seed=5, longest=50)]
LIMIT = 40


@pytest.fixture(params=["packed", "padded"])
def loaded(request, tiny_model):
    """A model in fp32, the prompts of the articles, and titles that end at all sorts of places."""
    model = load_base(str(tiny_model), CPU, torch.float32, nf4=False)
    prompt = Prompt(load_tokenizer(str(tiny_model)), "{article}\nTitre :", False, 200, LIMIT)
    prompts = [prompt.encode(article).ids for article in ARTICLES]
    free = Ends(frozenset({prompt.tokenizer.eos_token_id}), prompt.tokenizer.eos_token_id, b"")
    written = decoding.generate_ids(model, prompts, free, LIMIT)
    if request.param == "packed":
        assert packing.use_packed_attention(model, 300) is None
    # What this random model writes has neither EOS nor ends of lines; some of its tokens are now.
    ends = Ends(free.ids | {written[0][20], written[1][3]}, free.pad_id, kinds_of(written[2][30]))
    return model, prompts, ends, [ends.cut(ids) for ids in written]


def kinds_of(newline: int) -> bytes:
    kinds = bytearray([Ends.TEXT]) * 400
    kinds[newline] = Ends.BREAK
    return bytes(kinds)


def test_rows_leave_when_they_end_and_change_no_other(loaded, monkeypatch):
    model, prompts, ends, expected = loaded
    assert len({len(ids) for ids in expected}) > 3
    assert any(len(ids) == LIMIT for ids in expected)
    sizes, generate = [], model.generate

    def spy(input_ids, **options):
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", spy)
    assert decoding.generate_ids(model, prompts, ends, LIMIT) == expected
    assert sizes[0] == len(prompts) > sizes[-1]
    assert len(sizes) == 3  # rounds of 16, 16 and 8
    alone = [decoding.generate_ids(model, [ids], ends, LIMIT)[0] for ids in prompts]
    assert alone == expected


def test_prompts_are_read_in_rows_of_bounded_length(loaded, monkeypatch):
    model, prompts, ends, expected = loaded
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 150)
    rows = []
    monkeypatch.setattr(
        packing, "packed_row", lambda p, d, f=packing.packed_row: rows.append(p) or f(p, d)
    )
    assert decoding.generate_ids(model, prompts, ends, LIMIT) == expected
    if model.config._attn_implementation == packing.PACKED:
        assert 1 < len(rows) < len(prompts)
        assert all(sum(map(len, row)) <= 150 or len(row) == 1 for row in rows)
    else:
        assert not rows


def test_a_cache_with_room_holds_what_the_plain_one_does():
    rng = torch.Generator().manual_seed(0)
    roomy, plain = decoding.RoomyLayer(room=3), DynamicLayer()
    places = set()

    def same() -> None:
        assert roomy.get_seq_length() == plain.get_seq_length()
        for mine, other in ((roomy.keys, plain.keys), (roomy.values, plain.values)):
            assert torch.equal(mine, other)

    def update(sequences: int, tokens: int) -> None:
        new = [torch.randn(sequences, 2, tokens, size, generator=rng) for size in (4, 5)]
        for mine, other in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(mine, other)
        same()

    update(6, 6)
    for _ in range(3):
        update(6, 1)
        places.add(roomy.keys.data_ptr())
    assert len(places) == 1  # nothing was copied
    for layer in (roomy, plain):
        layer.batch_select_indices(torch.tensor([4, 0]))
        layer.reorder_cache(torch.tensor([1, 0]))
    same()
    for _ in range(5):  # more than there was room for
        update(2, 1)


def test_logits_exist_for_last_positions_alone(loaded):
    model, prompts, ends, _ = loaded
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    decoding.generate_ids(model, prompts, ends, 4)
    hook.remove()
    assert len(shapes) >= 4
    assert {shape[1] for shape in shapes} == {1}


def test_beams_and_least_lengths_do_not_depend_on_the_batch(loaded):
    model, prompts, ends, greedy = loaded
    for options in ({"num_beams": 3}, {"num_beams": 3, "length_penalty": -3.0}):
        together = decoding.generate_ids(model, prompts, ends, 12, **options)
        alone = [decoding.generate_ids(model, [ids], ends, 12, **options)[0] for ids in prompts]
        assert together == alone
        assert together != [ids[:12] for ids in greedy]
    short = min(map(len, greedy))
    assert short < 25
    eos_only = Ends(ends.ids, ends.pad_id, b"")
    longer = decoding.generate_ids(model, prompts, eos_only, LIMIT, min_new_tokens=25)
    assert all(len(ids) >= 25 for ids in longer)
    assert not any(token in ends.ids for ids in longer for token in ids[:24])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_title_may_be_kept_from_going_in_circles(loaded, num_beams):
    """Across its rounds, and without regard to what the article says."""
    model, prompts, ends, _ = loaded
    ends = Ends(ends.ids, ends.pad_id, b"")
    options = {"num_beams": num_beams, "min_new_tokens": 30}
    plain = decoding.generate_ids(model, prompts, ends, LIMIT, **options)
    kept = decoding.generate_ids(model, prompts, ends, LIMIT, **options, no_repeat_ngram_size=1)
    assert all(len(set(ids)) < len(ids) for ids in plain)
    assert all(len(set(ids)) == len(ids) for ids in kept)
    assert any(set(ids) & set(prompt) for ids, prompt in zip(kept, prompts, strict=True))
    alone = [
        decoding.generate_ids(model, [ids], ends, LIMIT, **options, no_repeat_ngram_size=1)[0]
        for ids in prompts
    ]
    assert alone == kept


def test_what_is_drawn_at_no_temperature_is_what_is_likeliest(loaded):
    """Also where some continuations of a prompt have ended, and all those of others."""
    model, prompts, ends, expected = loaded
    seeds = [[n, n + 1, n + 2] for n in range(len(prompts))]
    how = {"temperature": 1e-6, "top_k": 9}
    drawn = decoding.generate_ids(model, prompts, ends, LIMIT, seeds, **how)
    assert drawn == [ids for ids in expected for _ in range(3)]


def test_what_is_drawn_goes_with_its_seed_and_not_with_its_company(loaded):
    model, prompts, ends, _ = loaded
    seeds = [[10 * n, 10 * n + 1, 10 * n + 2] for n in range(len(prompts))]
    how = {"temperature": 1.0, "top_k": 64, "no_repeat_ngram_size": 3}
    drawn = decoding.generate_ids(model, prompts, ends, LIMIT, seeds, **how)
    assert len({len(ids) for ids in drawn}) > 3
    assert len(set(map(tuple, drawn))) > 2 * len(prompts)
    for n, ids in enumerate(prompts):
        alone = decoding.generate_ids(model, [ids], ends, LIMIT, seeds[n : n + 1], **how)
        assert alone == drawn[3 * n : 3 * n + 3]
        [one] = decoding.generate_ids(model, [ids], ends, LIMIT, [seeds[n][2:]], **how)
        assert one == alone[2]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores, count = torch.tensor([2.0, 0.5, -1.0, 1.0, -3.0, -4.0]), 20_000
    draw = decoding.Draw(0.7, 4, list(range(count)), prompt_length=5, steps=2)
    expected = (scores[:4] / 0.7).softmax(0)
    found = [draw(torch.empty(count, 5 + step), scores.expand(count, -1)) for step in range(2)]
    for tokens in (step.argmax(1) for step in found):
        shares = tokens.bincount(minlength=6) / count
        assert shares[:4].tolist() == pytest.approx(expected.tolist(), abs=0.015)
        assert shares[4:].tolist() == [0, 0]
    assert not torch.equal(*found)


def test_a_model_that_looks_into_its_keys_shares_no_prompts(loaded, monkeypatch):
    model = loaded[0]
    before = model.generation_config
    packed = model.config._attn_implementation == packing.PACKED
    assert decoding.can_share_prompts(model) == packed
    monkeypatch.setattr(packing, "attention_of_continuations", lambda _, key, *rest: key.shape)
    assert not decoding.can_share_prompts(model)
    assert model.generation_config is before


def test_attention_to_a_shared_prompt_is_that_to_its_copies():
    """Of three prompts with up to four continuations each; that of the second are all gone."""
    rng = torch.Generator().manual_seed(0)
    layer = decoding.RoomyLayer(room=3)
    layer.update(*(torch.randn(3, 2, 7, size, generator=rng) for size in (4, 5)))
    copies = decoding.RoomyLayer(room=3)
    copies.update(*(t.repeat_interleave(4, dim=0) for t in (layer.keys, layer.values)))
    shared = decoding.SharedLayer(layer, 4, 3)
    padding = torch.tensor([0, 2, 5]).repeat_interleave(4)  # columns that no one may look at
    for kept in ([*range(12)], [0, 2, 3, 8, 10], [1, 3, 4]):
        padding = padding[kept]
        for each in (shared, copies):
            each.batch_select_indices(torch.tensor(kept))
        new = [torch.randn(len(kept), 2, 1, size, generator=rng) for size in (4, 5)]
        query = torch.randn(len(kept), 6, 1, 4, generator=rng)
        parts, whole = shared.update(*new), copies.update(*new)
        assert shared.get_seq_length() == copies.get_seq_length()
        mask = torch.arange(shared.get_seq_length()) >= padding[:, None]
        for masked in (mask[:, None, None], None):
            found = packing.attention_of_continuations(query, *parts, masked, 0.3)[0]
            expected = packing.attention_of_one_token(query, *whole, masked, 0.3)[0]
            assert found.shape == (len(kept), 1, 6, 5)
            torch.testing.assert_close(found, expected)
    assert shared.prompts[0].shape[0] == 2  # the second is let go of


def test_only_the_new_tokens_count_as_repeated():
    ids, scores = torch.tensor([[5, 6, 7, 9, 5, 6]]), torch.zeros(1, 10)
    rule = decoding.NoRepeatNGramLogitsProcessor(3)
    banned = [
        decoding.OfNewTokens(rule, length)(ids, scores.clone()).isinf().nonzero()[:, 1].tolist()
        for length in (0, 3)
    ]
    assert banned == [[7], []]


def test_the_criterion_of_a_line_is_that_of_cutting():
    rng, kinds = random.Random(0), bytes([0, 1, 2, 3, 5, 7, 1])
    ends, found = Ends(frozenset({99}), 99, kinds), 0
    for _ in range(300):
        ids = [rng.choice([*range(7), 8, 10**6]) for _ in range(rng.randint(1, 6))]
        cut = ends.cut(ids)
        stops = decoding.LineEnd(ends, 2)(torch.tensor([[3, 3, *ids]]), None).tolist()
        assert stops == [ends.ended(cut)], ids
        assert len(cut) == len(ids) or ends.ended(cut)
        found += stops[0]
    assert 100 < found < 250


def test_a_title_ends_where_its_line_does(tiny_model):
    """Neither before it has begun, nor later than at the newline that would be cut off."""
    prompt = Prompt(load_tokenizer(str(tiny_model)), "{article}\nTitre :", False, 160, 12)
    ends, tokenizer = prompt.ends(None), prompt.tokenizer
    ids = tokenizer("\n \n Le maire\nde Nîmes").input_ids
    cut = ends.cut(ids)
    assert tokenizer.decode(cut) == "\n \n Le maire\n"
    assert prompt.decode(cut) == prompt.decode(ids) == "Le maire"
    assert ends.ended(cut)
    assert not ends.ended(cut[:-1])
    title = infer.read_title(prompt, ends, cut)
    assert (title.stopped_by, title.num_new_tokens) == ("line", len(cut))
    assert infer.read_title(prompt, ends, [*cut[:-1], tokenizer.eos_token_id]).stopped_by == "eos"
    limited = infer.read_title(prompt, ends, cut[:-1])
    assert (limited.stopped_by, limited.title) == ("length", "Le maire")  # whole, to its last token
    assert limited.raw == "\n \n Le maire"


# ---------------------------------------------------------------------- memory


def test_a_batch_that_does_not_fit_is_halved_once_per_size_and_said_once(loaded, capsys):
    model, prompts, ends, expected = loaded
    tried, too_large = [], {}

    def generate(rows):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ids = decoding.generate_ids(model, [prompts[row] for row in rows], ends, LIMIT)
        return list(zip(rows, ids, strict=True))

    for _ in range(2):
        rows = list(range(9))
        found = decoding.in_halves(generate, rows, lambda batch: 100 * len(batch), too_large)
        assert found == list(enumerate(expected))
    assert [size for size in tried if size > 2] == [9, 5, 3]  # none of them a second time
    assert capsys.readouterr().out.count("do not fit into memory") == 1


def test_an_article_that_does_not_fit_alone_is_a_complaint():
    def generate(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(LoneError, match="not enough for one article with its title"):
        decoding.in_halves(generate, [1, 2], len, {})


def test_other_errors_are_not_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        decoding.in_halves(lambda _: exec("raise RuntimeError('shapes')"), [1, 2], len, {})


def test_the_budget_goes_by_free_memory_in_powers_of_two(loaded, monkeypatch):
    model = loaded[0]
    budgets = []
    for free in (1 << 20, 1 << 25, 1 << 25 | 1 << 20, 1 << 50):
        monkeypatch.setattr(decoding, "free_memory", lambda _, free=free: free)
        budgets.append(decoding.choose_max_batch_tokens(model))
    assert budgets[0] == decoding.LEAST_BATCH_TOKENS
    assert budgets[0] < budgets[1] == budgets[2] < budgets[3] == 16_384
    monkeypatch.setattr(decoding, "free_memory", lambda _: 1 << 25)
    assert decoding.choose_max_batch_tokens(model, num_beams=8) < budgets[1]


# ---------------------------------------------------------------------- continuous batching


def test_continuous_batching_writes_the_same(loaded):
    """With room for a few requests at a time, which all have to come and go."""
    model, prompts, ends, expected = loaded
    before = model.config._attn_implementation
    requests = {f"a{n}": ids for n, ids in enumerate(prompts)}
    found = dict(decoding.generate_continuously(model, requests, ends, LIMIT, 1024))
    assert [found[f"a{n}"] for n in range(9)] == expected
    assert model.config._attn_implementation == before


def test_continuous_batching_begins_nothing_once_it_is_to_stop(loaded):
    model, prompts, ends, _ = loaded
    requests, asked = {f"a{n}": ids for n, ids in enumerate(prompts)}, iter([False])
    found = decoding.generate_continuously(model, requests, ends, 4, 512, lambda: next(asked, True))
    assert 0 < len(list(found)) < 9


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ({"a1": "boom"}, r"no title for 1 of 3 articles \(a1: boom\); run"),
        ({"a0": None}, r"no title for 1 of 3 articles \(a0: the engine ended without them\)"),
        ({"a2": 3}, r"no title for 1 of 3 articles \(a2: it ended neither by EOS nor by its len"),
    ],
)
def test_failed_and_missing_requests_are_named(monkeypatch, answers, complaint):
    """The engine itself would log them and return the rest."""
    ends = Ends(frozenset({99}), 99, b"")

    class Manager:
        def __init__(self):
            self.waiting = []

        def add_request(self, ids, request_id, **_):
            self.waiting.append(request_id)

        def get_result(self, timeout):
            while self.waiting:
                name = self.waiting.pop(0)
                answer = answers.get(name, 5)
                if answer is not None:
                    error = answer if isinstance(answer, str) else None
                    ids = [7] * (answer if isinstance(answer, int) else 0) or [7]
                    return SimpleNamespace(
                        request_id=name,
                        error=error,
                        generated_tokens=ids,
                        is_finished=lambda: True,
                    )
            return None

        def is_running(self):
            return False

    @contextmanager
    def manager(**_):
        yield Manager()

    model = SimpleNamespace(
        continuous_batching_context_manager=manager,
        config=LlamaConfig(attn_implementation="sdpa"),
        set_attn_implementation=lambda name: None,
    )
    requests, found = {f"a{n}": [1, 2] for n in range(3)}, {}
    titles = decoding.generate_continuously(model, requests, ends, 5, 4096)
    with pytest.raises(LoneError, match=complaint):
        found.update(titles)
    assert found.keys() == requests.keys() - answers.keys()


def test_decoding_is_told_in_words():
    assert str(Decoding(5)) == "greedy"
    assert str(Decoding(5, no_repeat_ngram_size=6)) == "greedy, no 6 tokens twice"
    assert str(Decoding(5, 4, 3, -0.5)) == "4 beams, at least 3 tokens, length penalty -0.5"
