"A method in a package of its own: learned words that share a few directions"
import torch
from torch import nn
from torch.nn import functional as F

from clipprompt.learner import PromptLearner, Recipe
from clipprompt.prompts import Given, place


class LowRank(PromptLearner):
    "CoOp whose M words are mixed from r directions"
    method, learns_text = 'low-rank', True
    look = 'tab:olive', 'P'  # its colour and marker in figures

    def __init__(self, backbone, classnames,
        n_ctx=4,  # learned words M
        rank=2,   # directions r that they share
        seed=0,   # of the start
    ):
        super().__init__(backbone, classnames, n_ctx=n_ctx, rank=rank, seed=seed)
        normal = torch.Generator().manual_seed(seed)
        start = torch.randn(rank, backbone.text_width, generator=normal)      # [r, D]
        self.directions = nn.Parameter(.02*start)
        self.mix = nn.Parameter(torch.randn(n_ctx, rank, generator=normal))   # [M, r]
        self.sentences = place(backbone, self.classnames, n_ctx)

    def text_features(self): # [C, E], unit rows
        words = Given([self.mix @ self.directions])                           # 1 x [M, D]
        return F.normalize(self.text(self.sentences, words), dim=-1)

    @classmethod
    def recipe(cls, setting='few-shot', shots=16, dataset=''):
        return Recipe(lr=.002, epochs=50, batch_size=32, source='ours, a first guess')
