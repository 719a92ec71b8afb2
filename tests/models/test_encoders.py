"""The small encoders: equal alone and in a batch, saved and loaded by the Auto classes, their mel Whisper's."""

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel, WhisperFeatureExtractor

from mmtune.models.encoders import HistoryConfig, LogMelConfig, PatchesConfig, sinusoids
from mmtune.models.log_mel import LogMelFeatureExtractor

SMALL = {"hidden_size": 32, "intermediate_size": 64}


def seeded(config):
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize("config", [PatchesConfig(**SMALL), LogMelConfig(**SMALL), HistoryConfig(**SMALL)])
def test_an_encoder_comes_back_from_its_folder(config, tmp_path):
    model = seeded(config)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "_name_or_path": "",
        "architectures": [type(model).__name__],
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("samples", [400, 401, 7999, 16000])
def test_log_mel_is_whispers(samples: int):
    expected = WhisperFeatureExtractor()(
        noise(samples), sampling_rate=16000, padding="do_not_pad", return_tensors="pt"
    )["input_features"]
    assert torch.equal(LogMelFeatureExtractor()(noise(samples), sampling_rate=16000)["input_features"], expected)


def test_a_sound_of_thirty_seconds_has_whispers_padded_picture():
    padded = np.concatenate([noise(5000), np.zeros(480000 - 5000, np.float32)])
    expected = WhisperFeatureExtractor()(noise(5000), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert torch.equal(LogMelFeatureExtractor()(padded)["input_features"], expected)


def test_the_feature_extractor_comes_back_and_refuses_another_rate(tmp_path):
    made = LogMelFeatureExtractor(feature_size=40, sampling_rate=8000, n_fft=200, hop_length=80)
    made.save_pretrained(tmp_path)
    LogMelConfig().save_pretrained(tmp_path)
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert torch.equal(again(noise(900))["input_features"], made(noise(900))["input_features"])
    with pytest.raises(ValueError, match="16000"):
        again(noise(900), sampling_rate=16000)


def test_mel_mean_and_std_shift_and_scale_the_picture_and_come_back_from_the_folder(tmp_path):
    plain = LogMelFeatureExtractor()([noise(500), noise(900, 1)])
    made = LogMelFeatureExtractor(mel_mean=0.4, mel_std=0.3)
    made.save_pretrained(tmp_path)
    LogMelConfig(mel_mean=0.4, mel_std=0.3).save_pretrained(tmp_path)
    found = AutoFeatureExtractor.from_pretrained(tmp_path)([noise(500), noise(900, 1)])
    inside = plain["attention_mask"].bool()[:, None]
    expected = torch.where(inside, (plain["input_features"] - 0.4) / 0.3, 0.0)
    torch.testing.assert_close(found["input_features"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("samples", [1, 200, 3333])
def test_a_sound_has_the_same_features_alone_and_beside_a_longer_one(samples: int):
    config = LogMelConfig(**SMALL)
    model, extract = seeded(config), LogMelFeatureExtractor()
    alone, both = extract(noise(samples)), extract([noise(samples), noise(9000, 1)])
    with torch.no_grad():
        one, two = model(**alone), model(**both)
    tokens, longest = (-(-(size // config.hop_length) // 4) for size in (max(samples, config.n_fft), 9000))
    assert one.last_hidden_state.shape == (1, tokens, 32)
    assert model.feature_mask(both["attention_mask"]).sum(1).tolist() == [tokens, longest]
    torch.testing.assert_close(two.last_hidden_state[0, :tokens], one.last_hidden_state[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(two.pooler_output[0], one.pooler_output[0], atol=1e-5, rtol=0)
    assert not two.last_hidden_state[0, tokens:].any()
    torch.testing.assert_close(one.pooler_output[0], one.last_hidden_state[0].mean(0), atol=1e-5, rtol=0)


def test_the_positions_of_a_sound_are_whispers():
    from transformers.models.whisper.modeling_whisper import sinusoids as whispers

    torch.testing.assert_close(sinusoids(50, 32), whispers(50, 32))


def test_a_history_is_told_by_recency_wherever_the_padding_stands():
    model = seeded(HistoryConfig(**SMALL, window=4))
    left = model(torch.tensor([[0, 0, 5, 6, 7]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    right = model(torch.tensor([[5, 6, 7, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    alone = model(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(left.pooler_output, alone.pooler_output)
    torch.testing.assert_close(right.pooler_output, alone.pooler_output)
    swapped = model(torch.tensor([[6, 5, 7]])).pooler_output
    assert (swapped - alone.pooler_output).abs().max() > 1e-4


def test_a_history_longer_than_its_window_and_one_of_padding_alone_hold_numbers():
    model = seeded(HistoryConfig(**SMALL, window=2))
    made = model(torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert made.last_hidden_state.isfinite().all()
    assert not made.pooler_output[1].any()


def test_patches_are_told_by_their_place_and_an_image_of_another_size_is_refused():
    model = seeded(PatchesConfig(**SMALL, image_size=16))
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = model(image, output_hidden_states=True)
    assert made.last_hidden_state.shape == (1, 4, 32)
    assert len(made.hidden_states) == 3
    moved = model(image.roll(8, -1)).last_hidden_state
    assert (made.last_hidden_state[0, 0] - moved[0, 1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="16 are expected"):
        model(torch.rand(1, 3, 8, 8))
