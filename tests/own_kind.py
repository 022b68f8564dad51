"A kind of target as a user writes it in a file of their own: a direction, which the package knows nothing about"
import math

import torch
from paddy_multi.all import Target


def angular_error(preds, targs):
    "Mean angle between directions in degrees, the short way round"
    return ((preds - targs + 180) % 360 - 180).abs().mean()


class DirectionTarget(Target):
    "A direction in degrees: two output columns, one label column"
    kind, width, reads, value_format = 'direction', 2, (), '.3g'

    def _fit(self, train, valid):
        for label in (*train, *valid): self._angle(label)

    def _angle(self, label):
        if 0 <= label < 360: return float(label)
        raise ValueError(f'{self.name}: expected degrees from 0 to 360, found {label!r}')

    def _encode(self, label): return [self._angle(label)/180]
    def _decode(self, row): return float(f'{float(row[0])*180 % 360:.6g}')
    def random_rows(self, n, generator=None): return torch.rand(n, 1, generator=generator)*2

    def _losses(self, preds, y):
        "1 - the cosine of the angle between output and label"
        wanted = torch.cat([(y*math.pi).cos(), (y*math.pi).sin()], 1)
        return 1 - torch.cosine_similarity(preds, wanted, dim=1)

    def activation(self, preds): return torch.nn.functional.normalize(preds, dim=1)
    def to_rows(self, acts): return torch.atan2(acts[:, 1:], acts[:, :1])/math.pi % 2
    def to_units(self, column): return column*180
    def for_metric(self, preds, y): return self.to_rows(self.activation(preds))[:, 0]*180, y[:, 0]*180
    def default_metrics(self): return [angular_error]

    def item_values(self, metric):
        if metric is not angular_error: return None
        def values(preds, y): return ((self.to_rows(self.activation(preds)) - y + 1) % 2 - 1)[:, 0].abs()*180
        return values

    def wrong(self, y, rows, off_by=None):
        limit = 45 if off_by is None else off_by
        return ((rows - y + 1) % 2 - 1)[:, 0].abs()*180 > limit

    def values(self): return 'degrees'
    def baseline(self, labels): return 'chance: 90'
    def draw(self, interp):
        interp.plot_regression(self.name)
        return f'directions of {self.name}'
