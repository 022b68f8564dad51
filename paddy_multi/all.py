"Everything of `paddy_multi`, for notebooks: `from paddy_multi.all import *`"

# WRITTEN BY nbdev-export! DO NOT EDIT! Rooms as in settings.ini, modules in the order of notebooks.

from .kinds.losses import *
from .kinds.labelled import *
from .kinds.target import *
from .kinds.category import *
from .kinds.multicategory import *
from .kinds.regression import *
from .kinds.ordinal import *
from .kinds.count import *
from .kinds.columns import *
from .targets.slices import *
from .targets.sliced_metrics import *
from .targets.table import *
from .targets.encoded import *
from .targets.loss import *
from .targets.metrics import *
from .targets.declare import *
from .data.digits import *
from .data.paddy import *
from .data.weights import *
from .data.splitters import *
from .data.pictures import *
from .data.rows import *
from .data.balance import *
from .data.loaders import *
from .accumulate.chunks import *
from .accumulate.batches import *
from .accumulate.whole_head import *
from .accumulate.microbatch import *
from .accumulate.tracing import *
from .accumulate.steps import *
from .accumulate.memory import *
from .accumulate.processes import *
from .accumulate.case import *
from .accumulate.benchmark import *
from .train.heads import *
from .train.learner import *
from .train.checkpoint import *
from .train.fingerprint import *
from .train.run import *
from .use.show import *
from .use.predict import *
from .use.ensemble import *
from .use.interpret import *
from .use.report import *
