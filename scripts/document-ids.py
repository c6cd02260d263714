#!/usr/bin/env python3
"""Prints the test vectors of docs/protocol.md, computed from its text and not by Waybill's code.

Needs the package xxhash: python3 -m venv /tmp/v && /tmp/v/bin/pip install xxhash && /tmp/v/bin/python scripts/document-ids.py
"""
import base64
import hashlib
import uuid

import xxhash

A = "01890a5d-ac96-774b-bcce-b302099a8057"
B = "0192f3a4-0000-7000-8000-000000000001"
S = "0192f3a4-5b6c-7d8e-9fa0-b1c2d3e4f506"
T = "019aa112-8e00-7abc-bdef-0123456789ab"

# Sender, segment, offset, payload as the table writes it, payload.
VECTORS = [
    (A, S, 0, "`68656c6c6f`", b"hello"),
    (A, S, 6, "`68656c6c6f`", b"hello"),
    (A, S, 0, "`68656c6c6f0d`", b"hello\r"),
    (B, S, 0, "`68656c6c6f`", b"hello"),
    (A, T, 0, "`68656c6c6f`", b"hello"),
    (A, S, (1 << 40) - 1, "`78`", b"x"),
    (A, S, 0x123456789A, "`4772c3bcc39f6520e29c93`", "Grüße ✓".encode()),
    (B, T, 4096, "`fffe00c328`", b"\xff\xfe\x00\xc3\x28"),
    (B, T, 1 << 32, "1,048,576 × `78`", b"x" * (1 << 20)),
]


def document_id(sender: str, segment: str, offset: int, payload: bytes) -> str:
    sender, segment = uuid.UUID(sender).bytes, uuid.UUID(segment).bytes
    digest = hashlib.sha256(sender + segment).digest()
    xxh3 = xxhash.xxh3_64_intdigest(payload, seed=0).to_bytes(8, "big")
    whole = segment[:6] + digest[:8] + offset.to_bytes(5, "big") + xxh3[3:]
    return base64.urlsafe_b64encode(whole).decode()


for sender, segment, offset, text, payload in VECTORS:
    print(f"| `{sender}` | `{segment}` | {offset} | {text} | `{document_id(sender, segment, offset, payload)}` |")
