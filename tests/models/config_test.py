"""Tests the reading and writing of model configs."""

import dataclasses
import json
import math

from absl.testing import absltest, parameterized
import jax

from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, families

QWEN3 = {
  "model_type": "qwen3",
  "vocab_size": 100,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "intermediate_size": 48,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "tie_word_embeddings": True,
}


class FromHuggingFaceTest(parameterized.TestCase):
  def test_reads_every_field(self):
    self.assertEqual(
      families.read_config(QWEN3),
      config_lib.ModelConfig(
        family="qwen3",
        vocab_size=100,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=16,
        mlp_width=48,
        rope_theta=1e6,
        qk_norm=True,
        tied_embeddings=True,
        norm_eps=1e-6,
        max_positions=256,
      ),
    )

  def test_absent_keys_take_the_family_defaults(self):
    source = {
      key: value
      for key, value in QWEN3.items()
      if key not in ("head_dim", "num_key_value_heads", "tie_word_embeddings")
    }
    qwen3 = families.read_config(source)
    self.assertEqual((qwen3.head_width, qwen3.kv_heads), (128, 4))
    self.assertFalse(qwen3.tied_embeddings)
    llama = families.read_config(source | {"model_type": "llama"})
    self.assertEqual((llama.head_width, llama.qk_norm), (8, False))
    qwen2 = families.read_config(source | {"model_type": "qwen2"})
    self.assertTrue(qwen2.attention_bias)
    self.assertFalse(qwen2.output_bias)

  @parameterized.parameters("rope_scaling", "rope_parameters")
  def test_both_spellings_of_rope(self, key):
    rope = {
      "rope_type": "llama3",
      "factor": 8.0,
      "original_max_position_embeddings": 64,
      "low_freq_factor": 1.5,
      "high_freq_factor": 5.0,
      "rope_theta": 1e6,
    }
    config = families.read_config(QWEN3 | {key: rope})
    self.assertEqual(
      config.rope_scaling,
      config_lib.RopeScaling("llama3", 8.0, 64, 1.5, 5.0),
    )
    self.assertEqual(config.rope_theta, 1e6)

  @parameterized.parameters(
    ({"model_type": "gemma"}, "model_type 'gemma' is not supported"),
    ({"vocab_size": None}, "key 'vocab_size' is missing"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ({"mlp_bias": True}, "mlp_bias = True is not supported"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    ({"num_key_value_heads": 3}, "kv_heads must divide heads = 4, found 3"),
    ({"head_dim": 15}, "head_width must be even, found 15"),
    ({"num_hidden_layers": 0}, "layers must be >= 1, found 0"),
  )
  def test_refusals_name_the_key(self, change, message):
    with self.assertRaisesRegex(ValueError, message) as raised:
      families.read_config(QWEN3 | change)
    self.assertNotIn("\n", str(raised.exception))


# Keys of published multimodal models: what has its default is left out.
GEMMA3 = {
  "model_type": "gemma3",
  "vision_config": {"hidden_size": 1152},
  "text_config": {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  },
}


class WrapperTest(parameterized.TestCase):
  def test_the_text_of_a_multimodal_model(self):
    config = families.read_config(GEMMA3)
    self.assertEqual(config.family, "gemma3_text")
    self.assertEqual((config.vocab_size, config.width), (262_208, 2560))
    self.assertEqual((config.heads, config.kv_heads), (8, 4))
    self.assertEqual((config.head_width, config.query_scalar), (256, 256.0))
    self.assertEqual(config.rope_scaling, config_lib.RopeScaling("linear", 8.0))
    self.assertEqual((config.rope_theta, config.local_rope_theta), (1e6, 1e4))
    self.assertTrue(config.tied_embeddings)
    self.assertEqual(
      [kind.window for kind in config.layer_kinds[:6]], [1024] * 5 + [0]
    )

  @parameterized.parameters(
    ("language_model.model.norm.weight", "model.norm.weight"),
    ("model.language_model.norm.weight", "model.norm.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("vision_tower.vision_model.post_layernorm.bias", None),
    ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
  )
  def test_names_of_its_tensors(self, name, expected):
    self.assertEqual(families.rename(GEMMA3, name), expected)
    self.assertEqual(families.rename(QWEN3, name), name)

  def test_what_is_said_around_counts(self):
    untied = GEMMA3 | {"tie_word_embeddings": False}
    self.assertFalse(families.read_config(untied).tied_embeddings)
    quantised = GEMMA3 | {"quantization_config": {"bits": 4}}
    with self.assertRaisesRegex(ValueError, "quantization_config"):
      families.read_config(quantised)
    with self.assertRaisesRegex(ValueError, "'text_config' is missing"):
      families.read_config({"model_type": "gemma3"})


class ToHuggingFaceTest(parameterized.TestCase):
  @parameterized.parameters(
    "tiny", "smollm2-135m", "llama3.2-1b", "qwen2.5-0.5b", "qwen3-4b"
  )
  def test_round_trip_through_json(self, name):
    config = config_lib.named(name)
    written = json.dumps(families.write_config(config))
    self.assertEqual(families.read_config(json.loads(written)), config)

  @parameterized.parameters(
    config_lib.RopeScaling("linear", 2.0),
    config_lib.RopeScaling("llama3", 4.0, 64, 1.5, 5.0),
    config_lib.RopeScaling("yarn", 4.0, 64, beta_fast=16.0),
    config_lib.RopeScaling("yarn", 4.0, 64, attention_factor=1.25),
  )
  def test_round_trip_of_rope_scaling(self, scaling):
    config = dataclasses.replace(config_lib.named("tiny"), rope_scaling=scaling)
    written = families.write_config(config)
    self.assertEqual(families.read_config(written), config)

  def test_refuses_what_the_family_cannot_express(self):
    tiny = config_lib.named("tiny")
    with self.assertRaisesRegex(ValueError, "qk_norm = True.*'llama'"):
      families.write_config(dataclasses.replace(tiny, qk_norm=True))
    with self.assertRaisesRegex(ValueError, "attention_bias = False.*'qwen2'"):
      families.write_config(dataclasses.replace(tiny, family="qwen2"))


class NamedTest(parameterized.TestCase):
  def test_unknown_name_suggests_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "did you mean 'qwen3-4b'"):
      config_lib.named("qwen3-4B")

  @parameterized.parameters(
    # name, layers, width, query and key heads of 32, width of the MLP
    ("nano", 2, 64, 2, 1, 192),
    ("tiny", 4, 128, 4, 2, 384),
    ("small", 8, 256, 8, 4, 768),
  )
  def test_parameters_of_the_sizes_from_scratch(
    self, name, layers, width, heads, key_heads, inner
  ):
    attention = 2 * width * 32 * (heads + key_heads)
    layer = attention + 3 * width * inner + 2 * width
    expected = layers * layer + 1024 * width + width
    shapes = jax.tree.leaves(decoder.shapes(config_lib.named(name)))
    self.assertEqual(sum(math.prod(leaf.shape) for leaf in shapes), expected)


if __name__ == "__main__":
  absltest.main()
