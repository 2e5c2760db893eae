"""Which names and texts hold secrets, and that a cluster's profile takes none."""

from __future__ import annotations

import pytest

from megatron_r1.config.cluster import ClusterConfig
from megatron_r1.config.secrets import is_secret, secrets_of, without_secrets
from megatron_r1.errors import ConfigError

PLANTED = "p" * 12


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "JUDGE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT"),
        *("PGPASSWORD_OF", "db_password", "GITHUB_TOKEN", "OPENAI_APIKEY"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name) == (name != "PGPASSWORD_OF")


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PWD", "NCCL_IB_HCA", "MAX_TOKENS", "MONKEY", "KEYS_OF"])
def test_names_of_other_variables(name):
    assert not is_secret(name)


def test_values_of_secret_names_are_known_but_for_short_ones():
    assert secrets_of({"HF_TOKEN": f"{PLANTED}\n", "A_KEY": "1", "HOME": "/root/long"}) == (PLANTED,)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"a {PLANTED} b", "a *** b"),
        ("http://user:pw@host/v1 and https://host/v1", "http://***@host/v1 and https://host/v1"),
        ("export WANDB_API_KEY=abcd; module load cuda", "export WANDB_API_KEY=***; module load cuda"),
        ('export HF_TOKEN="$(cat token)"', 'export HF_TOKEN="$(cat token)"'),
        ("  HF_TOKEN: 'abcd'", "  HF_TOKEN: '***'"),
        ("x hf_" + "a" * 20, "x ***"),
        ("key sk-" + "a" * 20, "key ***"),
        ("rollout.max_response_tokens=8 rl.token=3", "rollout.max_response_tokens=8 rl.token=3"),
        ("sk-short task-force-of-many-words", "sk-short task-force-of-many-words"),
    ],
)
def test_texts_are_masked_and_others_stay(text, masked):
    assert without_secrets(text, (PLANTED,)) == masked


@pytest.mark.parametrize(
    ("key", "value"), [("environment", {"WANDB_API_KEY": PLANTED}), ("setup", [f"export HF_TOKEN={PLANTED}"])]
)
def test_a_profile_with_a_secret_is_refused_without_showing_it(key, value):
    with pytest.raises(ConfigError, match="env_file") as refused:
        ClusterConfig(**{key: value})
    assert refused.value.key == key and PLANTED not in str(refused.value)
