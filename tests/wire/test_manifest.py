"""Tests of `paris_p2p.wire.manifest`."""

import dataclasses
import hashlib
from typing import Any

import pytest

from paris_p2p.errors import ManifestError
from paris_p2p.ids import ROUTER, NodeId, RunId, expert_role
from paris_p2p.wire import canonical
from paris_p2p.wire.identity import Identity
from paris_p2p.wire.manifest import (
    MAX_MANIFEST_BYTES,
    SIGNING_CONTEXT,
    ExpertVariant,
    Latents,
    Manifest,
    Recipe,
    Training,
    check_manifest,
    sign_manifest,
)
from tests.samples import ORGANISER, TRAINING, manifest, ref, variant

STRANGER = Identity(b"s" * 32)


EXPERT = variant()
MANIFEST = manifest()
SIGNED = sign_manifest(MANIFEST, ORGANISER)


def signed_plain(change: dict[str, Any], signer: Identity = ORGANISER) -> bytes:
    """A manifest with fields changed before it was signed: only its content is wrong."""
    body = canonical.pack(canonical.to_plain(MANIFEST) | change)
    return canonical.pack({"body": body, "signature": signer.sign(SIGNING_CONTEXT + body)})


def test_a_signed_manifest_comes_back_as_it_went_in() -> None:
    checked = check_manifest(SIGNED.data, SIGNED.run_id)
    assert checked == SIGNED and checked.manifest == MANIFEST
    body = canonical.unpack(SIGNED.data, MAX_MANIFEST_BYTES)["body"]
    assert SIGNED.run_id == hashlib.sha256(body).digest()


def test_a_run_that_allows_a_key_one_role_has_the_bytes_it_always_had() -> None:
    assert "max_roles_per_node" not in canonical.to_plain(MANIFEST)
    several = dataclasses.replace(MANIFEST, max_roles_per_node=3)
    assert check_manifest(sign_manifest(several, ORGANISER).data).manifest == several


def test_any_changed_byte_is_refused() -> None:
    ends = [*range(60), *range(len(SIGNED.data) - 90, len(SIGNED.data))]  # envelope and signature: every byte
    for position in sorted({*ends, *range(0, len(SIGNED.data), 3)}):
        damaged = bytearray(SIGNED.data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(ManifestError):
            check_manifest(bytes(damaged))


def test_a_manifest_cut_short_or_lengthened_is_refused() -> None:
    for data in (b"", SIGNED.data[:-1], SIGNED.data + b"\0", SIGNED.data[: len(SIGNED.data) // 2]):
        with pytest.raises(ManifestError, match="not a run manifest"):
            check_manifest(data)


def test_another_run_than_the_expected_is_refused_with_both_ids() -> None:
    with pytest.raises(ManifestError, match=f"{SIGNED.run_id.hex()[:16]}.*{'00' * 8}"):
        check_manifest(SIGNED.data, RunId(bytes(32)))


def test_a_manifest_of_another_format_is_refused_with_its_number() -> None:
    with pytest.raises(ManifestError, match="format 2, this program reads format 1"):
        check_manifest(signed_plain({"format": 2, "new_field": 1}))


def test_a_manifest_signed_by_another_key_is_refused() -> None:
    with pytest.raises(ManifestError, match="signature"):
        check_manifest(signed_plain({}, STRANGER))


def test_a_manifest_is_not_signed_with_a_foreign_key() -> None:
    with pytest.raises(ManifestError, match="another organiser"):
        sign_manifest(MANIFEST, STRANGER)


def test_a_signature_over_another_kind_of_message_does_not_pass() -> None:
    body = canonical.encode(MANIFEST)
    with pytest.raises(ManifestError, match="signature"):
        check_manifest(canonical.pack({"body": body, "signature": ORGANISER.sign(body)}))


def test_a_manifest_over_the_cap_is_refused() -> None:
    with pytest.raises(ManifestError, match="at most"):
        check_manifest(bytes(MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": ""}, "name"),
        ({"name": "n" * 65}, "name"),
        ({"organiser": bytes(31)}, "organiser"),
        ({"clusters": []}, "clusters"),
        ({"clusters": canonical.to_plain(MANIFEST.clusters[1:])}, "numbered"),
        ({"replicas": -1}, "replicas"),
        ({"replicas": True}, "replicas: int"),
        ({"replicas": 1.0}, "replicas: int"),
        ({"max_roles_per_node": 0}, "max_roles_per_node is out of range"),
        ({"max_roles_per_node": 1026}, "max_roles_per_node is out of range"),
        ({"max_roles_per_node": 1}, "a default is not encoded"),
        ({"components": {str(i): canonical.to_plain(ref(i)) for i in range(17)}}, "components"),
        ({"example_prompts": ["x" * 201]}, "prompts"),
        ({"lease": {"ttl_s": 60.0, "renew_s": 40.0, "settle_s": 3.0, "poll_s": 10.0}}, "renew_s"),
        ({"lease": {"ttl_s": 60.0, "renew_s": 0.01, "settle_s": 3.0, "poll_s": 10.0}}, "0.5 <= renew_s"),
        ({"lease": {"ttl_s": 60.0, "renew_s": 20.0, "settle_s": 1e-9, "poll_s": 10.0}}, "0.5 <= settle_s"),
        (
            {"lease": {"ttl_s": 60.0, "renew_s": 20.0, "settle_s": 3.0, "poll_s": 1e-9}},
            "poll_s is not between",
        ),
        ({"lease": {"ttl_s": 9e9, "renew_s": 20.0, "settle_s": 3.0, "poll_s": 10.0}}, "ttl_s"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_signed_with_wrong_content_is_refused_with_the_reason(
    change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ManifestError, match=reason):
        check_manifest(signed_plain(change))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Training, {"steps": 0}),
        (Training, {"batch_size": 0}),
        (Training, {"ema_decay": 1.0}),
        (Training, {"caption_dropout": 1.5}),
        (Training, {"learning_rate": 0.0}),
        (Training, {"lr_schedule": "linear"}),
        (Training, {"timestep_sampling": "cosine"}),
        (Training, {"precision": "fp16"}),
        (ExpertVariant, {"objective": "gan"}),
        (Latents, {"space": "fourier"}),
        (Latents, {"size": 0}),
        (Recipe, {"experts": ()}),
        (Recipe, {"checkpoint_interval_steps": 0}),
    ],
)
def test_a_recipe_out_of_range_cannot_be_made(kind: type[Any], change: dict[str, Any]) -> None:
    values: dict[type[Any], Any] = {
        Training: TRAINING,
        ExpertVariant: EXPERT,
        Latents: MANIFEST.recipe.latents,
        Recipe: MANIFEST.recipe,
    }
    with pytest.raises(ValueError, match=r"\w"):
        dataclasses.replace(values[kind], **change)


def test_roles_know_their_training_network_and_shards() -> None:
    assert MANIFEST.roles == (expert_role(0), expert_role(1), ROUTER)
    assert MANIFEST.architecture(ROUTER).model_class == "Router"
    assert MANIFEST.architecture(expert_role(1)).model_class == "PixArtTransformer2DModel"
    assert MANIFEST.training(ROUTER) == TRAINING
    assert MANIFEST.shards(expert_role(1)) == (ref(3), ref(4))
    assert MANIFEST.shards(ROUTER) == (ref(1), ref(2), ref(3), ref(4))


def two_kinds(*allowed: tuple[int, ...]) -> Manifest:
    """Two variants of expert, and for each cluster those it may be."""
    noise = dataclasses.replace(EXPERT, name="noise", objective="ddpm", initial=ref(9))
    noise = dataclasses.replace(noise, training=dataclasses.replace(TRAINING, steps=200))
    clusters = tuple(
        dataclasses.replace(cluster, variants=some)
        for cluster, some in zip(MANIFEST.clusters, allowed, strict=True)
    )
    recipe = dataclasses.replace(MANIFEST.recipe, experts=(EXPERT, noise))
    return dataclasses.replace(MANIFEST, recipe=recipe, clusters=clusters)


def test_an_expert_may_be_what_its_cluster_says_or_else_any_variant() -> None:
    manifest = check_manifest(sign_manifest(two_kinds((1,), ()), ORGANISER).data).manifest
    first, second = expert_role(0), expert_role(1)
    assert [manifest.variants(role) for role in manifest.roles] == [(1,), (0, 1), (0,)]
    assert (manifest.training(first).steps, manifest.training(second).steps) == (200, 100)
    assert manifest.training(second, 1).steps == 200
    assert manifest.initial(first) == (None, ref(9))
    only_flow = two_kinds((0,), ())
    assert only_flow.initial(first) == (None, None)


@pytest.mark.parametrize("variants", [(2,), (-1,), (1, 0), (1, 1)])
def test_variants_that_the_recipe_does_not_have_or_in_disorder_are_refused(variants: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="variants"):
        two_kinds(variants, ())


def test_the_same_manifest_has_the_same_run_id_whoever_encodes_it() -> None:
    shuffled = dict(reversed(MANIFEST.components.items()))
    again = sign_manifest(dataclasses.replace(MANIFEST, components=shuffled), ORGANISER)
    assert again.run_id == SIGNED.run_id
    other = dataclasses.replace(MANIFEST, organiser=NodeId(STRANGER.node_id))
    assert sign_manifest(other, STRANGER).run_id != SIGNED.run_id
