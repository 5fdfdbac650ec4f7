"""A model from outside plays by tool calls, started from the command line.

A whole run in a process of its own: about half a minute of CPU time, because
decoder, adapters and sampler compile for a model that nothing else uses.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest
import jax
import numpy as np
import tokenizers
import transformers

from t2po_jax import records
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder, families, weights
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.training import metrics
from tests import places

ROOT = places.ROOT
# Refuses a system message, lists tools, and strips thoughts from history.
TEMPLATE = (
  "{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('no system') }}{% endif %}"
  "{% if tools %}<s>tools{% for tool in tools %} {{ tool.function.name }}"
  "{% endfor %}</s>{% endif %}"
  "{% for m in messages %}<s>{{ m['role'] }}\n"
  "{{ m['content'].split('</think>') | last | trim }}</s>{% endfor %}"
  "{% if add_generation_prompt %}<s>model\n"
  "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
GEMMA = config_lib.ModelConfig(
  "gemma3_text",
  vocab_size=420,
  width=32,
  layers=2,
  heads=2,
  kv_heads=1,
  head_width=16,
  mlp_width=48,
  qk_norm=True,
  kinds=(config_lib.LayerKind(8, "local"), config_lib.LayerKind()),
  activation="gelu_tanh",
  query_scalar=16.0,
  norm_offset=True,
  post_norms=True,
  scaled_embeddings=True,
  max_positions=256,
)


def write_model(place: pathlib.Path) -> tokenizer_lib.Tokenizer:
  """A folder as users of the hub have it: shards and several end tokens."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<pad>", "<s>", "</s>", "<end>"],
    show_progress=False,
  )
  text = (
    "echo swap red green blue pink<think> red red</think>\n<tool_call>\n"
    '{"name": "action", "arguments": {"text": "red"}}\n</tool_call>'
  )
  backend.train_from_iterator([text] * 9, trainer)
  made = tokenizer_lib.HuggingFaceTokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      eos_token="</s>",
      pad_token="<pad>",
      chat_template=TEMPLATE,
    )
  )
  params = jax.jit(decoder.Policy(GEMMA).init)(jax.random.key(0))
  weights.save(params, GEMMA, place, shard_bytes=20_000)
  made.save(place)
  (place / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [2, 3]})
  )
  return tokenizer_lib.load(place)


def start(*arguments, config="smoke"):
  found = subprocess.run(
    [
      sys.executable,
      str(ROOT / "experiments" / "main.py"),
      f"--config={ROOT / 'configs' / config}.py",
      "--config.log.tensorboard=False",
      *arguments,
    ],
    capture_output=True,
    text=True,
    timeout=900,
  )
  return found.returncode, found.stdout + found.stderr


class BringYourOwnTest(absltest.TestCase):
  def test_a_model_of_the_hubs_form_plays_by_tool_calls(self):
    with tempfile.TemporaryDirectory() as directory:
      place = pathlib.Path(directory)
      made = write_model(place / "model")
      self.assertEqual(made.eos_ids, (2, 3))
      index = json.loads(
        (place / "model" / "model.safetensors.index.json").read_text()
      )
      self.assertGreater(len(set(index["weight_map"].values())), 1)
      code, output = start(
        f"--workdir={place / 'run'}",
        f"--config.cache_dir={place / 'cache'}",
        f"--config.model.source={place / 'model'}",
        '--config.model.template_arguments={"enable_thinking": true}',
        "--config.env.grammar=tool_call",
        "--config.rollout.prefix=",
        "--config.rollout.context=append",
        "--config.rollout.max_prompt=192",
        "--config.rollout.max_response=48",
        "--config.train.row_tokens=256",
        "--config.rollout.tasks=1",
        "--config.eval.tasks=2",
        "--config.cold_start.episodes=8",
        "--config.cold_start.epochs=1",
        "--config.train.updates=1",
        "--config.train.eval_every=0",
        "--config.lora.rank=2",
      )
      self.assertEqual(code, 0, output)
      (line,) = [
        line
        for line in metrics.read(place / "run" / "metrics.jsonl")
        if "train/return" in line
      ]
      self.assertTrue(np.isfinite(line["train/return"]))
      # The expert's calls are understood.
      self.assertIn("success 1.000", output)

  def test_a_search_engine_is_called_as_a_tool(self):
    """Search QA by tool calls, from the command line."""
    with tempfile.TemporaryDirectory() as directory:
      place = pathlib.Path(directory)
      code, output = start(
        f"--workdir={place / 'run'}",
        f"--config.cache_dir={place / 'cache'}",
        "--config.env.grammar=tool_call",
        "--config.env.expert_doubt=0.0",
        "--config.model.size=nano",
        "--config.rollout.tasks=1",
        "--config.rollout.slots=8",
        "--config.rollout.max_prompt=160",
        "--config.rollout.max_response=64",
        "--config.train.row_tokens=256",
        "--config.eval.tasks=1",
        "--config.cold_start.episodes=24",
        "--config.cold_start.epochs=2",
        "--config.train.updates=1",
        "--config.train.eval_every=0",
        config="searchqa",
      )
      self.assertEqual(code, 0, output)
      (line,) = [x for x in output.splitlines() if x.startswith("expert:")]
      self.assertGreater(float(line.split()[-1]), 0.7)  # Its calls count.
      folder = place / "run" / records.FOLDER
      written = [
        turn["text"]
        for entry in records.read_index(folder)
        for turn in records.read_episode(folder, entry)["turns"]
      ]
    # The thinking intervention opens a call, or the policy has learned to.
    opened = '</think>\n<tool_call>\n{"name": "'
    self.assertTrue(any(opened in text for text in written), written)

  def test_wrong_settings_get_one_line(self):
    with tempfile.TemporaryDirectory() as directory:
      write_model(pathlib.Path(directory) / "model")
      code, output = start(
        f"--workdir={directory}/run",
        f"--config.cache_dir={directory}/cache",
        f"--config.model.source={directory}/model",
        "--config.model.template_arguments=[1]",
      )
    self.assertNotEqual(code, 0)
    self.assertNotIn("Traceback", output)
    self.assertIn("expected a JSON object", output.strip().splitlines()[-1])


class ConfigTest(absltest.TestCase):
  def test_the_written_config_is_gemmas(self):
    written = families.write_config(GEMMA)
    self.assertEqual(families.read_config(written), GEMMA)


if __name__ == "__main__":
  absltest.main()
