"""A link's first frames: the right secret opens it, and everything else closes it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from pdserve.core.errors import ProofError, ProtocolError
from pdserve.core.ids import Epoch, WorkerId
from pdserve.core.messages import DrainWorker, OpaquePayload
from pdserve.core.request import Role
from pdserve.transport.base import PoolExport
from pdserve.transport.handshake import (
    PROTOCOL_VERSION,
    Hello,
    PoolOffer,
    Welcome,
    check_hello,
    check_welcome,
    prove,
)
from pdserve.transport.wire import Decoder, encode

SECRET = b"open sesame"
OFFER = PoolOffer(transport="shm", token=b"t", num_bytes=4096, num_fds=1)
HELLO = prove(
    Hello(
        worker=WorkerId("prefill-0"),
        epoch=Epoch(3),
        role=Role.PREFILL,
        pool=OFFER,
        nonce=b"0123456789abcdef",
    ),
    SECRET,
)
WELCOME = prove(
    Welcome(
        worker=WorkerId("gateway"),
        epoch=Epoch(1),
        role=None,
        pool=None,
        nonce=b"fedcba9876543210",
        answers=HELLO.nonce,
    ),
    SECRET,
)
CHANGES: dict[str, Any] = {
    "version": PROTOCOL_VERSION + 1,
    "family": "elsewhere",
    "answers": bytes(16),
    "worker": WorkerId("prefill-1"),
    "epoch": Epoch(4),
    "role": Role.DECODE,
    "pool": replace(OFFER, num_bytes=8192),
    "nonce": bytes(16),
    "proof": bytes(32),
}


def test_a_proven_hello_and_its_welcome_are_let_in() -> None:
    (hello,) = Decoder(guarded=True).feed(encode(HELLO))
    assert check_hello(hello, SECRET) == HELLO
    (welcome,) = Decoder(guarded=True).feed(encode(WELCOME))
    assert check_welcome(welcome, SECRET, HELLO) == WELCOME


@pytest.mark.parametrize("name", [field.name for field in fields(Hello)])
def test_no_field_can_be_changed_without_the_secret(name: str) -> None:
    with pytest.raises(ProofError, match="does not know the cluster secret"):
        check_hello(replace(HELLO, **{name: CHANGES[name]}), SECRET)
    with pytest.raises(ProofError, match="does not know the cluster secret"):
        check_welcome(replace(WELCOME, **{name: CHANGES[name]}), SECRET, HELLO)


def test_another_secret_or_no_proof_is_refused() -> None:
    for wrong in (prove(HELLO, b"open barley"), replace(HELLO, proof=b"")):
        with pytest.raises(ProofError, match="start both sides with the same one"):
            check_hello(wrong, SECRET)


def test_a_link_begins_with_the_right_frame() -> None:
    with pytest.raises(ProofError, match="begins with Welcome"):
        check_hello(WELCOME, SECRET)
    with pytest.raises(ProofError, match="is Hello, not a welcome"):
        check_welcome(HELLO, SECRET, HELLO)


def test_a_hello_is_not_a_welcome_in_disguise() -> None:
    names = {field.name for field in fields(Hello)}
    shared = {name: getattr(HELLO, name) for name in names}
    with pytest.raises(ProofError):
        check_welcome(Welcome(**shared | {"answers": HELLO.nonce}), SECRET, HELLO)


def test_an_old_welcome_opens_no_new_link() -> None:
    hello = prove(replace(HELLO, nonce=b"another-nonce-16"), SECRET)
    with pytest.raises(ProofError, match="answers another hello"):
        check_welcome(WELCOME, SECRET, hello)


def test_another_version_says_what_to_do() -> None:
    with pytest.raises(ProtocolError, match="run the same build everywhere"):
        check_hello(prove(replace(HELLO, version=PROTOCOL_VERSION + 1), SECRET), SECRET)


def test_a_short_nonce_is_refused() -> None:
    with pytest.raises(ProofError, match="nonce"):
        check_hello(prove(replace(HELLO, nonce=b""), SECRET), SECRET)


def test_an_offer_is_joined_with_its_descriptors() -> None:
    export = PoolExport("shm", b"t", 4096, (7,))
    assert PoolOffer.of(export) == OFFER
    assert OFFER.export((7,)) == export
    for fds in ((), (7, 8)):
        with pytest.raises(ProtocolError, match="an offer of 1"):
            OFFER.export(fds)


def test_a_guarded_decoder_gives_the_first_frame_and_holds_the_rest() -> None:
    decoder = Decoder(guarded=True)
    assert decoder.feed(encode(WELCOME) + encode(DrainWorker()) + encode(HELLO)[:9]) == [WELCOME]
    assert decoder.admit() == [DrainWorker()]
    assert decoder.feed(encode(HELLO)[9:]) == [HELLO]


def test_a_stranger_cannot_make_us_collect_a_large_frame() -> None:
    large = OpaquePayload(attempt=None, offset=0, data=bytes(1 << 20), last=True)  # type: ignore[arg-type]
    decoder = Decoder(guarded=True)
    with pytest.raises(ProtocolError, match="before any proof"):
        decoder.feed(encode(large)[:6])
