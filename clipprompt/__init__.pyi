# The front: `import clipprompt as cp`, then cp.NAME. No module has a front name.
from .adapters import ClipAdapter as ClipAdapter, LPPlusPlus as LPPlusPlus, TaskRes as TaskRes
from .adapters import TipAdapter as TipAdapter, TipAdapterF as TipAdapterF
from .anchored import KgCoOp as KgCoOp, ProGrad as ProGrad, PromptSRC as PromptSRC
from .backbone import Backbone as Backbone, load_backbone as load_backbone
from .check import check_learner as check_learner
from .cocoop import CoCoOp as CoCoOp
from .coop import CoOp as CoOp
from .coprompt import CoPrompt as CoPrompt
from .data import DataSet as DataSet
from .deep import IVLP as IVLP, VPT as VPT, MaPLe as MaPLe
from .dept import DePT as DePT
from .distill import PromptKD as PromptKD
from .evaluation import evaluate as evaluate
from .inference import Prediction as Prediction, predict as predict, predictions as predictions
from .inside import MMA as MMA, MMRL as MMRL, ClipLoRA as ClipLoRA
from .learner import PromptLearner as PromptLearner, Recipe as Recipe
from .map_dafe import MAPDAFE as MAPDAFE
from .metaprompt import MetaPrompt as MetaPrompt
from .methods import find_method as find_method, load as load
from .mudpt import MuDPT as MuDPT
from .page import live as live
from .protocols import Method as Method
from .provp import ProVP as ProVP, ProVPRef as ProVPRef
from .report import compare as compare
from .sets import as_dataset as as_dataset, load_dataset as load_dataset
from .tcp import TCP as TCP
from .training import fit as fit
from .variational import VariationalCoCoOp as VariationalCoCoOp, VariationalCoOp as VariationalCoOp
from .zeroshot import BestTemplate as BestTemplate, LinearProbe as LinearProbe
from .zeroshot import ZeroShot as ZeroShot

__version__: str
