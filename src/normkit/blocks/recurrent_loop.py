"""What LSTM, GRU and RNN with norms share: the loop over layers, directions and time steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normkit.blocks.recurrent_norms import PLACEMENTS, StepNorm, step_norm
from normkit.blocks.recurrent_padding import Ends, lengths_of, packed_like, padded, reversed_in_time
from normkit.blocks.recurrent_steps import STEPS, State
from normkit.blocks.token_norms import NormName

Hidden = Tensor | tuple[Tensor, Tensor] | None


class Recurrent(nn.RNNBase):
    """What the three share: the norms, and the loop over layers, directions and time steps."""

    norms: nn.ModuleDict | None
    on_state: Callable[[int, int, Tensor], None] | None = None
    """Is shown every output of every time step as it arises: ``(place, step, h)``, h of (n, outputs), before it goes on
    to the next step; place counts directions within layers. A layer without norms runs the loop then, too."""

    def _set_norms(self, norm: NormName, placement: str, scale: float | None, where: dict[str, Any]) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"{type(self).__name__}: placement={placement!r} is neither {' nor '.join(PLACEMENTS)}")
        self.norm, self.placement, self.scale = norm, placement, scale
        self.norms = None
        if norm is None:
            return
        first: Any = self.weight_hh_l0
        gates: int = first.shape[0]
        sizes = {"input": gates}
        if placement == "all":
            sizes["hidden"] = gates
            if self.mode == "LSTM":
                sizes["cell"] = self.hidden_size
        shifts = {"input": False, "hidden": False, "cell": self.bias}  # torch's biases do it for the gates
        made = lambda: nn.ModuleDict({part: step_norm(norm, size, shifts[part], where) for part, size in sizes.items()})
        self.norms = nn.ModuleDict({name.removeprefix("weight_ih_"): made() for name, *_ in self._all_weights})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and biases as torch draws them; norms as new, with their first scale."""
        norms = self.__dict__.get("_modules", {}).pop("norms", None)  # torch's loop is over all parameters
        super().reset_parameters()
        if norms is not None:
            self.norms = norms
            for part in norms.modules():
                if isinstance(part, StepNorm):
                    part.reset(self.scale, alone=self.placement == "input")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A checkpoint of torch's layer has no norms: these stay as they are."""
        if self.norms is not None and not any(name.startswith(f"{prefix}norms.") for name in state_dict):
            state_dict.update(self.norms.state_dict(prefix=f"{prefix}norms."))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """torch's text, then the options that torch's layer does not have."""
        text = super().extra_repr()
        if self.norm is not None:
            text += f", norm={self.norm!r}"
            text += "" if self.placement == "all" else f", placement={self.placement!r}"
            text += "" if self.scale is None else f", scale={self.scale:g}"
        return text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """(steps, n, inputs) -> (steps, n, directions * outputs), and the last state: see the class."""
        name = type(self).__name__
        if isinstance(input, PackedSequence):
            if lengths is not None or mask is not None:
                raise ValueError(f"{name}: a packed sequence knows its lengths; leave lengths= and mask= out")
            return self._packed(input, hx) if self._looping else self._plain(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}: the input is {tuple(input.shape)}; it has 2 axes, or 3 with samples")
        time = 1 if self.batch_first and input.dim() == 3 else 0
        if mask is not None and mask.shape != input.shape[:-1]:
            raise ValueError(f"{name}: the mask is {tuple(mask.shape)}; for this input it is {tuple(input.shape[:-1])}")
        by_time = None if mask is None else mask.movedim(time, 0).reshape(input.shape[time], -1)
        known = lengths_of(name, lengths, by_time, input.shape[time])
        if known is None and not self._looping:
            return self._plain(input, hx)
        return self._tensor(input, hx, known)

    @property
    def _looping(self) -> bool:
        return self.norms is not None or self.on_state is not None

    def _plain(self, input: Any, hx: Any) -> tuple[Any, Any]:
        """Without norms: torch's own, which is one operator."""
        return super().forward(input, hx)

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        x, lengths = padded(input)
        state = self._first(x, None if hx is None else self.permute_hidden(hx, input.sorted_indices))
        self.check_forward_args(input.data, hx if hx is not None else self._handed(state), input.batch_sizes)
        y, last = self._run(x, state, lengths)
        return packed_like(input, y, lengths), self.permute_hidden(self._handed(last), input.unsorted_indices)

    def _tensor(self, input: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        alone = input.dim() == 2
        if alone:
            input = input.unsqueeze(int(self.batch_first is False))
            hx = hx if hx is None else _each(hx, lambda t: t.unsqueeze(1))
        x = input.transpose(0, 1) if self.batch_first else input
        state = self._first(x, hx)
        self.check_forward_args(input, self._handed(state), None)
        if not self._looping:
            assert lengths is not None
            y, last = self._plain(pack_padded_sequence(x, lengths, enforce_sorted=False), self._handed(state))
            y, _ = pad_packed_sequence(y, total_length=x.shape[0])
        else:
            y, run = self._run(x, state, lengths)
            last = self._handed(run)
        y = y.transpose(0, 1) if self.batch_first else y
        if alone:
            y, last = y.squeeze(int(self.batch_first is False)), _each(last, lambda t: t.squeeze(1))
        return y, last

    def _first(self, x: Tensor, hx: Any) -> State:
        """The state before the first step, (layers * directions, n, size) each."""
        if hx is not None:
            return hx if isinstance(hx, tuple) else (hx,)
        places = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, self.hidden_size]
        return tuple(x.new_zeros(places, x.shape[1], size) for size in sizes[: 2 if self.mode == "LSTM" else 1])

    def _handed(self, state: State) -> Any:
        """As torch's layer hands it out."""
        return state if self.mode == "LSTM" else state[0]

    def _run(self, x: Tensor, first: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """All layers in both directions."""
        if not len(x):
            raise ValueError(f"{type(self).__name__}: the input has no time step; give one at least")
        if lengths is not None:  # behind the end may be anything, and NaN times 0 is NaN
            counts = torch.arange(len(x))[:, None] < lengths
            x = torch.where(counts.to(x.device)[..., None], x, 0)
        directions = 2 if self.bidirectional else 1
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            ways = []
            for way in range(directions):
                place = layer * directions + way
                y, state = self._one(x, tuple(part[place] for part in first), lengths, place, backwards=way == 1)
                ways.append(y)
                last.append(state)
            x = ways[0] if directions == 1 else torch.cat(ways, 2)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _one(
        self, x: Tensor, state: State, lengths: Tensor | None, place: int, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction: the input's part for all time steps at once, then a step after the other."""
        names = self._all_weights[place]
        weight = {name.rsplit("_l", 1)[0]: getattr(self, name) for name in names}
        norms: Any = {} if self.norms is None else self.norms[names[0].removeprefix("weight_ih_")]
        if backwards:
            x = reversed_in_time(x, lengths)
        ends = Ends(x, lengths)
        driven = F.linear(x, weight["weight_ih"])
        if "input" in norms:
            driven = norms["input"].all_steps(driven, ends)
        late = weight.get("bias_hh") if self.mode == "GRU" else None  # its reset gate multiplies what has this bias
        if self.bias:
            driven = driven + (weight["bias_ih"] if late is not None else weight["bias_ih"] + weight["bias_hh"])
        y, state = self._steps(driven, state, ends, norms, weight, late, place)
        return (reversed_in_time(y, lengths) if backwards else y), state

    def _steps(
        self,
        driven: Tensor,
        state: State,
        ends: Ends,
        norms: Any,
        weight: dict[str, Tensor],
        late: Tensor | None,
        place: int,
    ) -> tuple[Tensor, State]:
        step, project, outputs = STEPS[self.mode], weight.get("weight_hr"), []
        hidden, cell = (norms[part].by_step() if part in norms else None for part in ("hidden", "cell"))
        for t, drive in enumerate(driven[: ends.longest].unbind(0)):
            going = ends.going(t)
            recurrent = F.linear(state[0], weight["weight_hh"], late if hidden is None else None)
            if hidden is not None:
                recurrent = hidden(recurrent, t, going)
                recurrent = recurrent if late is None else recurrent + late
            new = step(drive, recurrent, state, lambda c: c if cell is None else cell(c, t, going))  # noqa: B023
            if project is not None:
                new = (F.linear(new[0], project), *new[1:])
            if self.on_state is not None:
                self.on_state(place, t, new[0])
            if going is None:
                state = new
                outputs.append(state[0])
                continue
            counts = going[:, None]  # a sequence that has ended keeps its last state
            state = tuple(torch.where(counts, now, before) for now, before in zip(new, state, strict=True))
            outputs.append(torch.where(counts, new[0], 0))
        y = torch.stack(outputs)
        return F.pad(y, (0, 0, 0, 0, 0, len(driven) - ends.longest)), state


def _each(hx: Any, change: Any) -> Any:
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)
