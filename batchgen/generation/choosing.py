"""Choosing the next tokens of rows, each with its own parameters; the one implementation of all engines.

The result is that of the order in vLLM's V1 sampler: the constraint's mask (the log-probabilities that a row asks for
are taken with it alone); allowed tokens, bad words, fewest tokens; the bias; repetition, frequency and presence
penalty; the end of the thinking, where its budget is used up; then the best token of a greedy row, or temperature and
a draw (`generation.sampling`). Forbidden tokens are -inf whenever that is written, so that `generation.edits` may do it
with the bias, and `bad_words` of several tokens and `min_tokens` may come last. Rows that ask for none of it cost
nothing but their argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from batchgen.generation.choice import NOTHING_LEFT, Choice, TokenLogprobs
from batchgen.generation.edits import apply_bitmask, count_tokens, edit_logits
from batchgen.generation.logprobs import find_likeliest
from batchgen.generation.masks import Masks
from batchgen.generation.pools import BiasPool, SeenPool
from batchgen.generation.row_groups import EditedPart, RowGroups
from batchgen.generation.row_state import RowState
from batchgen.generation.sampling import sample_rows, send
from batchgen.models.tokenizer import HfTokenizer
from batchgen.types import Prompt, SamplingParams


def needs_chooser(prompt: Prompt) -> bool:
    """Returns whether a row needs more than the best token of each step: a `TokenChooser`."""
    params = prompt.params
    return bool(
        params.temperature > 0
        or params.logprobs
        or params.edits_logits
        or params.constraint is not None
        or params.thinking_tokens is not None
    )


class TokenChooser:
    """Chooses the next tokens of rows. A row in work has a place: its number in a static batch, its slot in `paged`.

    Args:
        places: how many there are.
        vocabulary: the model's: the width of its logits.
        tokenizer: the model's.
        device: of the logits.
        agree: overwrites token ids, int64 [rows], with those of the first of several ranks, and returns them
            (`Peers.tokens`). Their logits should be the same, bit by bit; if ever they are not, ranks that choose
            differently would end their rows at different steps, and would wait for each other for ever. None: this
            rank chooses alone.
    """

    def __init__(
        self,
        places: int,
        vocabulary: int,
        tokenizer: HfTokenizer,
        device: torch.device,
        *,
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._agree = agree
        self._tokenizer, self._device, self._vocabulary = tokenizer, device, vocabulary
        self._seen, self._biases = SeenPool(vocabulary, device), BiasPool(vocabulary, device)
        self._masks = Masks(places, tokenizer, device)
        self._rows: list[RowState | None] = [None] * places
        nobody = Prompt(-1, "", 0, "", (), SamplingParams(), {})
        self._nobody = RowState(-1, nobody, (), tokenizer, (self._seen, self._biases))
        self._groups: RowGroups | None = None  # of the places of the step before

    def begin(self, place: int, prompt: Prompt, generated: Sequence[int] = ()) -> None:
        """Lets a row take a free place, maybe with tokens that it has generated (preempted, then computed again)."""
        self.end(place)
        if not needs_chooser(prompt):
            return  # its best token is all that is wanted, as in a place that is free
        row = self._rows[place] = RowState(place, prompt, generated, self._tokenizer, (self._seen, self._biases))
        if prompt.params.constraint is not None:
            self._masks.begin(place, prompt.params.constraint, row.answer_tokens)
        self._groups = None  # a pool may have grown

    def end(self, place: int) -> None:
        """Frees the place of a row; nothing happens if it is free."""
        row, self._rows[place] = self._rows[place], None
        if row is not None:
            row.end()
            self._groups = None
            if row.params.constraint is not None:
                self._masks.end(place)

    def is_edited(self, place: int) -> bool:
        """Returns whether the row's logits are changed or masked in the next step, or may be: where
        `awaits_tokens` is true, it is known once `advance` has the row's last token."""
        row = self._rows[place]
        return row is not None and (row.is_edited or row.awaits_tokens)

    def awaits_tokens(self, place: int) -> bool:
        """Returns whether the row's next token cannot be chosen before its last one was given to `advance`."""
        row = self._rows[place]
        return row is not None and row.awaits_tokens

    def advance(self, tokens: Mapping[int, int]) -> None:
        """Takes the last tokens of places that await them. The masks of the next step begin to be made in threads."""
        answers = {place: token for place, token in tokens.items() if self._row(place).append(token)}
        self._masks.advance(
            {place: token for place, token in answers.items() if self._row(place).params.constraint is not None}
        )

    def is_complete(self, place: int) -> bool:
        """Returns whether nothing can follow what the row has, by its constraint, since the last `advance`."""
        return self._masks.is_complete(place)

    def find_error(self, place: int) -> str | None:
        """Returns what has gone wrong with the row's constraint; None: nothing has. Such a row fails, alone.

        It is known after `advance`, or for a row that has just begun, after `choose`.
        """
        return self._masks.find_error(place)

    def choose(self, logits: torch.Tensor, places: Sequence[int], best: torch.Tensor) -> Choice:
        """Chooses one token for each of some rows. It never waits for the device, but waits for masks.

        Args:
            logits: as the model gives them, [rows or more, vocabulary]; they are not changed.
            places: of the rows, each of them once; where a row has ended meanwhile, any token is chosen.
            best: the best token id of each row, int64 [rows or more]; negative where there is none (the logits are not
                finite), which stays.
        """
        rows = [self._rows[place] or self._nobody for place in places]
        self._masks.wait()
        groups = self._find_groups(rows)
        own = best[: len(rows)]
        tokens = self._force_ends_of_thinking(self._draw(logits, own, groups, rows), rows)
        tokens = torch.where(own < 0, own, tokens)
        if self._agree is not None:
            tokens = self._agree(tokens)
        if groups.seen is not None:
            assert self._seen.rows is not None
            which, seen_rows = groups.seen
            count_tokens(self._seen.rows, seen_rows, tokens[which])
        chosen = Choice(tokens, self._find_logprobs(logits, groups, rows, tokens))
        for row in rows:
            row.generated += 1
        return chosen

    def _draw(
        self, logits: torch.Tensor, best: torch.Tensor, groups: RowGroups, rows: Sequence[RowState]
    ) -> torch.Tensor:
        """Returns the best token of each row, or another one where it is sampled or its logits are edited."""
        tokens = best
        if groups.is_sampled:
            numbers = [[row.seed for row in rows], [row.generated for row in rows]]
            draws = send(torch.tensor(numbers), self._device)
        if groups.plain is not None:
            sampled, params = groups.plain
            drawn = sample_rows(logits, sampled, draws[0, sampled], draws[1, sampled], params)
            tokens = tokens.index_copy(0, sampled, drawn)
        for part in groups.edited:
            own = draws[:, part.sampled_rows] if part.sampling is not None else None
            tokens = tokens.index_copy(0, part.rows, self._choose_edited(logits, part, rows, own))
        return tokens

    def _force_ends_of_thinking(self, tokens: torch.Tensor, rows: Sequence[RowState]) -> torch.Tensor:
        """Returns `tokens` with those of the end mark where a row's budget for thinking is used up."""
        thinking = [(number, row.thinking) for number, row in enumerate(rows) if row.thinking is not None]
        forced = [(number, row.forced) for number, row in thinking if row.forced is not None]
        if not forced:
            return tokens
        which, ids = send(torch.tensor(forced).T.contiguous(), self._device)
        return tokens.index_copy(0, which, ids)

    def _choose_edited(
        self, logits: torch.Tensor, part: EditedPart, rows: Sequence[RowState], draws: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the tokens of the rows of `part`; `draws` has seed and step of those that are sampled."""
        edited = logits[part.rows].float()
        some = [rows[number] for number in part.numbers]
        if part.masked_count:
            apply_bitmask(edited[: part.masked_count], self._find_masks(some[: part.masked_count]))
        edit_logits(edited, part.edits)
        forbidden = [(n, token) for n, row in enumerate(some) for token in row.find_forbidden()]
        pairs = [(n, token) for n, token in forbidden if token < self._vocabulary]
        if pairs:
            places, ids = send(torch.tensor(pairs).T.contiguous(), self._device)
            edited[places, ids] = -torch.inf
        largest, tokens = edited.max(-1)
        if part.sampling is not None:
            assert draws is not None
            drawn = sample_rows(edited, part.sampled, draws[0], draws[1], part.sampling)
            tokens = tokens.index_copy(0, part.sampled, drawn)
        return tokens.masked_fill(largest == -torch.inf, NOTHING_LEFT)

    def _find_masks(self, rows: Sequence[RowState]) -> torch.Tensor:
        """Returns the masks of rows that have one, int32 [rows, words]."""
        offered = {row.place: row.thinking.offered for row in rows if row.thinking is not None}
        also = {place: token for place, token in offered.items() if token is not None}
        return self._masks.find([row.place for row in rows], also)

    def _find_logprobs(
        self, logits: torch.Tensor, groups: RowGroups, rows: Sequence[RowState], tokens: torch.Tensor
    ) -> TokenLogprobs | None:
        found = []
        for asking in groups.asking:
            masks = self._find_masks([rows[number] for number in asking.numbers]) if asking.is_masked else None
            chosen = tokens[asking.rows].clamp(min=0)
            found.append(find_likeliest(logits, asking.rows, chosen, groups.most_logprobs, masks))
        if not found:
            return None
        numbers = [number for asking in groups.asking for number in asking.numbers]
        return TokenLogprobs(numbers, *map(torch.cat, zip(*found, strict=True)))

    def _find_groups(self, rows: Sequence[RowState]) -> RowGroups:
        """Returns the groups of these rows; those of the step before, if they are the same."""
        if self._groups is None or not self._groups.matches(rows):
            self._groups = RowGroups(rows, self._vocabulary, (self._seen, self._biases), self._device)
        return self._groups

    def _row(self, place: int) -> RowState:
        row = self._rows[place]
        if row is None:
            raise LookupError(f"no row has begun in place {place}")
        return row
