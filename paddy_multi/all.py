"Everything of `paddy_multi`, for notebooks: `from paddy_multi.all import *`"
from .data import *
from .sliced import *
from .kinds import *
from .targets import *
from .loss import *
from .metrics import *
from .learner import *
from .dataloaders import *
from .training import *
from .show import *
from .chunks import *
from .microbatch import *
from .paddy import *
from .weights import *
from .splitters import *
from .predict import *
from .interpret import *
