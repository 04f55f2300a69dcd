"""Scores of ensembles: CRPS, spread against skill, rank histogram, energy score.

A forecast is M equally likely members x_1 ... x_M of a pixel (or frame) whose truth is y. A forecast without members is an
ensemble of one, its mean, so that deterministic models stand in the same table: their CRPS is their mean absolute error,
and what needs two members is NaN.

Axes: B batch, S forecast frames, M members, C channels, H W space, N pixels of a frame (C H W flattened).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from forecast.batch import Forecast
from forecast.errors import UserError
from forecast.metrics.metric import AdditiveMetric, Counts, Pixels, Scope, Score, Sum, pieces, ratio

_AT_ONCE = 2**20  # numbers of members looked at together: 8 MiB in float64, of which some copies live at a time


def crps(crps_sum: Counts, pixels: Counts) -> Counts:
    """Continuous ranked probability score of the empirical distribution, mean over pixels, in units; best 0.

    CRPS = integral (F(t) - 1[t >= y])^2 dt = mean_i |x_i - y| - 1 / (2 M^2) sum_ij |x_i - x_j|, where F(t) is the share of
    members at or below t. With one member it is the absolute error.

    Reference: Hersbach (2000), Weather and Forecasting 15, 559, doi 10.1175/1520-0434(2000)015<0559:DOTCRP>2.0.CO;2.
    """
    return ratio(crps_sum, pixels)


def crps_fair(crps_fair_sum: Counts, spread_pixels: Counts) -> Counts:
    """Fair CRPS: what the CRPS would be, in expectation, of infinitely many members drawn alike; in units, best 0.

    CRPS_fair = mean_i |x_i - y| - 1 / (2 M (M - 1)) sum_ij |x_i - x_j|. It compares ensembles of different sizes, can be
    below 0 for a single pixel, and is NaN for one member, from which no spread can be estimated.

    Reference: Ferro (2014), Q. J. R. Meteorol. Soc. 140, 1917, doi 10.1002/qj.2270.
    """
    return ratio(crps_fair_sum, spread_pixels)


def spread(spread_square_sum: Counts, spread_pixels: Counts) -> Counts:
    """Root of the mean ensemble variance, in units: sqrt(mean of (M + 1) / M s^2), s^2 = sum_i (x_i - mean x)^2 / (M - 1).

    With (M + 1) / M, a reliable ensemble of any size has a spread equal to the RMSE of its mean.

    Reference: Fortin et al. (2014), J. Hydrometeorology 15, 1708, doi 10.1175/JHM-D-14-0008.1.
    """
    root: Counts = ratio(spread_square_sum, spread_pixels) ** 0.5
    return root


def ensemble_rmse(ensemble_square_sum: Counts, pixels: Counts) -> Counts:
    """Root mean squared error of the members' mean, in units; best 0: sqrt(mean of (mean x - y)^2).

    Reference: Fortin et al. (2014), J. Hydrometeorology 15, 1708, doi 10.1175/JHM-D-14-0008.1.
    """
    root: Counts = ratio(ensemble_square_sum, pixels) ** 0.5
    return root


def rank_frequency(rank_sum: Counts, pixels: Counts) -> Counts:
    """Rank histogram: the share of pixels with 0, 1, ..., M members below the truth; 1 / (M + 1) each if reliable.

    A truth that equals t members shares its pixel evenly among the t + 1 ranks that it could have.

    Reference: Hamill (2001), Mon. Wea. Rev. 129, 550, doi 10.1175/1520-0493(2001)129<0550:IORHFV>2.0.CO;2.
    """
    return ratio(rank_sum, pixels)


def energy_score(energy_sum: Counts, frames: Counts) -> Counts:
    """Energy score of whole frames, mean over frames, in units; best 0.

    ES = [mean_i |x_i - y| - 1 / (2 M^2) sum_ij |x_i - x_j|] / sqrt(n) with Euclidean norms over the frame's n valid pixels:
    the CRPS for vectors (that of the empirical distribution, not the fair one), divided by sqrt(n) so that frames with
    missing pixels compare. With one member it is the frame's RMSE.

    Reference: Gneiting and Raftery (2007), J. Amer. Stat. Assoc. 102, 359, doi 10.1198/016214506000001437.
    """
    return ratio(energy_sum, frames)


class Ensemble(AdditiveMetric):
    """Sums over pixels where the truth is valid and it and all members are finite; over frames for the energy score.

    Args:
        scope: what is scored.
        members: size of the ensembles, which the ranks of the histogram depend on; a forecast has as many, one or none.

    Raises:
        UserError: fewer than one member.
    """

    SUMS: ClassVar[Mapping[str, Sum]] = {
        "ensemble_pixels": Sum("valid pixels where all members are finite", dtype=torch.int64),
        "spread_pixels": Sum("of these, pixels with two members or more", dtype=torch.int64),
        "crps_sum": Sum("sum of the continuous ranked probability score", power=1),
        "crps_fair_sum": Sum("sum of the fair continuous ranked probability score", power=1),
        "spread_square_sum": Sum("sum of (M + 1) / M times the variance of M members", power=2),
        "ensemble_square_sum": Sum("sum of (mean of the members - truth)^2", power=2),
        "rank_sum": Sum("pixels by number of members below the truth, ties shared", ("rank",)),
        "energy_frames": Sum("frames with a pixel in ensemble_pixels", dtype=torch.int64),
        "energy_sum": Sum("sum over frames of the energy score per square root of pixels", power=1),
    }
    SCORES: ClassVar[Mapping[str, Score]] = {
        "crps": Score("continuous ranked probability score", best=0.0, power=1, heading="CRPS", log="crps"),
        "crps_fair": Score("fair continuous ranked probability score", best=0.0, power=1),
        "spread": Score("ensemble spread", power=1),
        "ensemble_rmse": Score("root mean squared error of the members' mean", best=0.0, power=1),
        "spread_skill_ratio": Score("ensemble spread per RMSE", best=1.0, heading="spread/RMSE", log="spread_skill"),
        "rank_frequency": Score("relative frequency of the truth's rank in the ensemble"),
        "energy_score": Score("energy score per square root of pixels", best=0.0, power=1),
    }

    def __init__(self, scope: Scope, members: int) -> None:
        if members < 1:
            raise UserError(f"members={members} for the scores of ensembles; it must be 1 or more.")
        self.members = members
        super().__init__(scope)

    def coordinates(self) -> dict[str, xr.Variable]:
        notes = {"long_name": "members below the truth", "units": "1"}
        return {"rank": xr.Variable("rank", torch.arange(self.members + 1).numpy(), notes)}

    def collect(self, forecast: Forecast, pixels: Pixels, block: Tensor) -> None:
        """Adds one batch; see `AdditiveMetric.update`.

        Raises:
            UserError: the forecast has another number of members than was announced.
        """
        members = forecast.mean.unsqueeze(1) if forecast.members is None else forecast.members
        count = members.shape[1]
        if count not in (1, self.members):
            raise UserError(
                f"A forecast has {count} members where the scores of ensembles expect {self.members}; "
                "ask the model and the scores for the same number of members."
            )
        samples, steps = pixels.truth.shape[:2]
        sums: dict[str, Tensor] = {}
        for rows, leads in pieces(samples, steps, _AT_ONCE // (count * pixels.truth.shape[2:].numel())):
            seen = pixels.truth[rows, leads].double()
            errors = members[rows, :, leads].double() - seen.unsqueeze(1)
            # A mean over members is finite where all of them are.
            defined = Pixels(errors.mean(1), seen, pixels.counted[rows, leads]).compared
            errors = torch.where(defined.unsqueeze(1), errors, 0.0).movedim(1, 2).flatten(3)
            for name, values in self._sums(errors, defined.flatten(2)).items():
                whole = sums.setdefault(name, values.new_zeros(samples, steps, *values.shape[2:]))
                whole[rows, leads] = values
        for name, values in sums.items():
            self.add(name, block, values)

    @classmethod
    def scores(cls, counts: xr.Dataset) -> dict[str, xr.DataArray]:
        pixels, spread_pixels = counts["ensemble_pixels"], counts["spread_pixels"]
        spreads = spread(counts["spread_square_sum"], spread_pixels)
        errors = ensemble_rmse(counts["ensemble_square_sum"], pixels)
        return {
            "crps": crps(counts["crps_sum"], pixels),
            "crps_fair": crps_fair(counts["crps_fair_sum"], spread_pixels),
            "spread": spreads,
            "ensemble_rmse": errors,
            "spread_skill_ratio": ratio(spreads, errors),
            "rank_frequency": rank_frequency(counts["rank_sum"], pixels),
            "energy_score": energy_score(counts["energy_sum"], counts["energy_frames"]),
        }

    def _sums(self, errors: Tensor, defined: Tensor) -> dict[str, Tensor]:
        """What frames add to the states, B S each: errors x - y, B S M N, 0 where not defined; defined B S N."""
        members = errors.shape[2]
        pixels = defined.sum(2)
        absolute = torch.linalg.vector_norm(errors, 1, dim=(2, 3)) / members
        # sum_{i<j} |x_i - x_j| = sum_i (2 i - M - 1) x_(i) of the sorted members x_(1) <= ... <= x_(M).
        weights = 2 * torch.arange(1, members + 1, device=errors.device, dtype=errors.dtype) - members - 1
        pairs = (errors.transpose(2, 3).contiguous().sort().values.sum(2) * weights).sum(2)
        # Not by a Gram matrix, whose rounding keeps equal members apart by 1e-8 of their length.
        norms = torch.linalg.vector_norm(errors, dim=3).mean(2)
        distances = torch.cdist(errors, errors, compute_mode="donot_use_mm_for_euclid_dist").sum((2, 3))
        mean = errors.mean(2)
        # One member has no spread: it adds no pixels to what the spread is divided by.
        others = max(1, members - 1)
        deviations = (errors - mean.unsqueeze(2)).square().sum((2, 3))
        return {
            "ensemble_pixels": pixels,
            "spread_pixels": pixels if members > 1 else torch.zeros_like(pixels),
            "crps_sum": absolute - pairs / members**2,
            "crps_fair_sum": absolute - pairs / (members * others) if members > 1 else torch.zeros_like(pairs),
            "spread_square_sum": deviations / others * (members + 1) / members,
            "ensemble_square_sum": mean.square().sum(2),
            "rank_sum": self._ranks(errors, defined),
            "energy_frames": pixels > 0,
            "energy_sum": (norms - distances / (2 * members**2)) / pixels.clamp_min(1).double().sqrt(),
        }

    def _ranks(self, errors: Tensor, defined: Tensor) -> Tensor:
        """Pixels by rank, B S (members + 1)."""
        repeats = self.members // errors.shape[2]  # a single member stands for as many equal ones
        below = (errors < 0).sum(2) * repeats
        ties = (errors == 0).sum(2) * repeats
        # Counted as whole numbers by (below, ties) first, then shared: no pixel is rounded.
        size = self.members + 1
        case = torch.where(defined, below * size + ties, size**2)
        cases = torch.zeros(*case.shape[:2], size**2 + 1, dtype=torch.int64, device=case.device)
        cases.scatter_add_(2, case, torch.ones_like(case))
        rank = torch.arange(size, device=case.device)
        first, tied = rank.view(-1, 1, 1), rank.view(1, -1, 1)
        shares = ((rank >= first) & (rank <= first + tied)) / (tied + 1).double()
        return cases[..., :-1].double() @ shares.flatten(0, 1)
