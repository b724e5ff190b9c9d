"""Captioners: steps against whole sentences, and the searches against all sentences that there are."""

import itertools

import pytest
import torch

from cvfast.models.captioning import END, PAD, START, ShowAttendTell, ShowTell, beam_search, greedy

WORDS, LONGEST = 6, 4  # PAD, START, END and three words


@pytest.fixture(params=[ShowAttendTell, ShowTell])
def captioner(request):
    """A tiny captioner whose scores are far from even."""
    torch.manual_seed(1)
    model = request.param(WORDS, 1, features=8, embedding=8, hidden=8).eval()
    torch.nn.init.normal_(model.words.weight, 0.0, 2.0)
    torch.nn.init.normal_(model.embed.weight, 0.0, 2.0)
    return model


@pytest.fixture
def images():
    return torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def log_probability(captioner, image, words):
    """Of one sentence, by the whole-sentence forward; PAD and START are never said."""
    scores = captioner(image, torch.tensor([[START, *words[:-1]]]))[0][0]
    scores[:, [PAD, START]] = -torch.inf
    return sum(row.log_softmax(0)[word].item() for row, word in zip(scores, words, strict=True))


def all_sentences():
    said = range(END, WORDS)
    for length in range(1, LONGEST + 1):
        for words in itertools.product(said, repeat=length):
            if END not in words[:-1] and (words[-1] == END or length == LONGEST):
                yield list(words)


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_sentences(captioner, images):
    found, total = beam_search(captioner, images, LONGEST, beams=200)
    for image, words, value in zip(images, found.tolist(), total.tolist(), strict=True):
        best = max(all_sentences(), key=lambda words: log_probability(captioner, image[None], words))
        assert words == best + [PAD] * (LONGEST - len(best))
        assert value == pytest.approx(log_probability(captioner, image[None], best), abs=1e-4)


@torch.no_grad()
def test_one_beam_is_greedy_and_more_are_no_worse(captioner, images):
    words, weights = greedy(captioner, images, 7)
    one, total = beam_search(captioner, images, 7, beams=1)
    assert torch.equal(words, one)
    assert words.shape == (5, 7) and (weights is None) == isinstance(captioner, ShowTell)
    assert not ((words == PAD) & (words.roll(1, 1) != END) & (words.roll(1, 1) != PAD))[:, 1:].any()
    for image, row, value in zip(images, words.tolist(), total.tolist(), strict=True):
        said = row[: row.index(END) + 1] if END in row else row
        assert value == pytest.approx(log_probability(captioner, image[None], said), abs=1e-4)
    assert (beam_search(captioner, images, 7, beams=4)[1] >= total - 1e-5).all()


def test_searches_refuse_no_beams_and_no_words(captioner, images):
    for arguments in ((0, 3), (5, 0)):
        with pytest.raises(ValueError, match="positive"):
            beam_search(captioner, images, *arguments)


@torch.no_grad()
def test_a_sentence_at_once_is_its_words_one_after_the_other(captioner, images):
    sentences = torch.randint(END, WORDS, (5, 6), generator=torch.Generator().manual_seed(3))
    scores, weights = captioner(images, sentences)
    state = captioner.start(images)
    for step, words in enumerate(sentences.unbind(1)):
        logits, state, looked = captioner.step(words, state)
        torch.testing.assert_close(scores[:, step], logits, rtol=1e-4, atol=1e-5)
        if weights is not None:
            torch.testing.assert_close(weights[:, step], looked, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(looked.sum(1), torch.ones(5))
            assert looked.shape == (5, 16)


def test_training_reaches_every_parameter(captioner, images):
    scores, _ = captioner.train()(images, torch.full((5, 3), START))
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in captioner.parameters())


def test_a_place_is_known_by_where_it_is():
    """On an even image only the coordinates can tell the places apart."""
    model = ShowAttendTell(WORDS, 1, features=8, embedding=8, hidden=8).eval()
    places = model.start(torch.zeros(1, 1, 64, 64))[0].unflatten(1, (16, 16))
    assert (places[0, 7, 7] - places[0, 7, 8]).abs().max() > 1e-3
    assert (places[0, 7, 7] - places[0, 8, 7]).abs().max() > 1e-3
