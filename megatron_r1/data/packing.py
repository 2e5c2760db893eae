"""Best-fit packing: documents fill sequences without being cut, unless they are longer than a sequence.

As in Ding et al. 2024, "Fewer Truncations Improve Language Modeling": a document longer than a sequence is cut into
full pieces and a rest. Then each piece, the longest first, goes to the sequence in which it leaves the least room
(best-fit decreasing).

Shapes: N documents, P pieces, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_r1.data.counter_rng import uniforms


@dataclass(frozen=True, slots=True)
class Packing:
    """Sequences, each a list of pieces of documents."""

    document_P: np.ndarray
    """Document of each piece, pieces in the order of the sequences."""
    start_P: np.ndarray
    """First token of the piece in its document."""
    stop_P: np.ndarray
    """Token after its last."""
    first_piece_S: np.ndarray
    """First piece of each sequence, and the number of pieces: S + 1 numbers."""

    def __len__(self) -> int:
        return len(self.first_piece_S) - 1


def pack(lengths_N: np.ndarray, capacity: int, seed: int) -> Packing:
    """Pack documents into sequences.

    The pieces of a cut document overlap by one token: the last token of a piece, which is a target only, is the first
    input of the next piece, so that every token of a document but its first is a target once.

    Args:
        lengths_N: tokens of each document.
        capacity: tokens of a sequence, the last target included; at least 2.
        seed: of the order of the pieces in a sequence; without shuffling, each would start with its longest piece.
    """
    document_P, start_P, length_P = pieces(lengths_N, capacity)
    sequence_P = best_fit(length_P, capacity)
    order_P = np.lexsort((uniforms(seed, document_P, start_P), sequence_P))
    counts_S = np.bincount(sequence_P) if len(sequence_P) else np.empty(0, np.int64)
    first_piece_S = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_S, dtype=np.int64)])
    document_P, start_P, length_P = document_P[order_P], start_P[order_P], length_P[order_P]
    return Packing(document_P, start_P, start_P + length_P, first_piece_S)


def pieces(lengths_N: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, start and length of every piece; a document of one token has no target and therefore no piece."""
    step = capacity - 1
    targets_N = np.maximum(lengths_N - 1, 0)
    counts_N = -(-targets_N // step)
    document_P = np.repeat(np.arange(len(lengths_N)), counts_N)
    first_N = np.cumsum(counts_N) - counts_N
    start_P = (np.arange(len(document_P)) - first_N[document_P]) * step
    return document_P, start_P, np.minimum(lengths_N[document_P] - start_P, capacity)


def best_fit(length_P: np.ndarray, capacity: int) -> np.ndarray:
    """The sequence of each piece by best-fit decreasing: int64 [P].

    Pieces of the same length are assigned together: a sequence that is the tightest fit for one of them remains the
    tightest for the next as long as the next fits too. The running time depends on the number of different lengths and
    remaining rooms, and hardly on the number of pieces.
    """
    sequence_P = np.empty(len(length_P), dtype=np.int64)
    order_P = np.argsort(-length_P, kind="stable")
    cuts = np.flatnonzero(np.diff(length_P[order_P])) + 1
    rooms = Rooms()
    made = 0
    for group in np.split(order_P, cuts) if len(order_P) else []:
        length = int(length_P[group[0]])
        while len(group):
            room = rooms.tightest(length)
            if room:
                open_sequences = rooms.take(room)
            else:
                room = capacity
                needed = -(-len(group) // (capacity // length))
                open_sequences = np.arange(made, made + needed)
                made += needed
            each = room // length
            used = min(len(open_sequences), -(-len(group) // each))
            placed = min(len(group), used * each)
            sequence_P[group[:placed]] = np.repeat(open_sequences[:used], each)[:placed]
            group = group[placed:]
            last = placed - (used - 1) * each
            rooms.put(room - each * length, open_sequences[: used - 1])
            rooms.put(room - last * length, open_sequences[used - 1 : used])
            rooms.put(room, open_sequences[used:])
    return sequence_P


class Rooms:
    """Sequences that are not full, by the number of tokens that still fit."""

    def __init__(self) -> None:
        self._sequences: dict[int, list[np.ndarray]] = {}
        self._mask = 0
        """Bit r is set where a sequence with room r exists."""

    def tightest(self, length: int) -> int:
        """The smallest room of at least `length`; 0 where there is none."""
        above = self._mask >> length
        return length + (above & -above).bit_length() - 1 if above else 0

    def take(self, room: int) -> np.ndarray:
        """Remove and return all sequences with that room."""
        self._mask &= ~(1 << room)
        return np.concatenate(self._sequences.pop(room))

    def put(self, room: int, sequences: np.ndarray) -> None:
        if room and len(sequences):
            self._sequences.setdefault(room, []).append(sequences)
            self._mask |= 1 << room
