"""What a drawn token is judged by: the cumulative distribution in fp64."""

import torch

# How far the sums of the backends may be off: a few hundred additions in fp32.
SLACK = 3e-6


def assert_drawn(result, scores, uniforms, slack=SLACK):
    """The tokens are where the distributions of the scores (..., V), logits over temperature and
    -inf where not kept, pass the numbers; and the log-probabilities are theirs."""
    if result.tokens.numel() == 0:
        return
    scores = scores.double()
    p = torch.softmax(scores, -1)
    after = p.cumsum(-1)
    at = result.tokens.unsqueeze(-1)
    probability, after = p.gather(-1, at).squeeze(-1), after.gather(-1, at).squeeze(-1)
    assert (probability > 0).all()
    assert (after > uniforms - slack).all()
    assert (after - probability <= uniforms + slack).all()
    expected = torch.log_softmax(scores, -1).gather(-1, at).squeeze(-1)
    torch.testing.assert_close(result.logprobs.double(), expected, atol=2e-5, rtol=2e-6)
    assert (result.logprobs <= 0).all()
