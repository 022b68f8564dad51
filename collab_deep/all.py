"Everything of `collab_deep`, for notebooks: `from collab_deep.all import *`"
from .data.movielens import *
from .models.embedding import *
from .lists.evaluate import *
from .use.explain import *
from .models.ensemble import *
from .models.factor import *
from .lists.fold_in import *
from .train.losses import *
from .train.learner import *
from .data.loaders import *
from .models.chapter import *
from .lists.recommend import *
from .use.report import *
from .use.save import *
from .data.splits import *
