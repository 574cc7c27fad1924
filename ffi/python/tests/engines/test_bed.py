"""The bed itself: a plain engine serves, repeats itself, hits its own cache, and leaves no process
behind.
"""

from bed.model import prompt
from bed.server import BLOCK_TOKENS, Counted, Engine


def test_a_plain_engine_answers_the_same_with_and_without_its_own_cache(tiny_model, logs):
    """One prompt three times: computed, from the engine's own cache, and computed again after a
    reset.
    """
    with Engine(tiny_model, logs, "plain") as engine:
        asked = prompt(11, 150)
        computed = engine.complete(asked)
        assert len(computed.tokens) == 8
        assert engine.complete(prompt(12, 150)).tokens != computed.tokens
        with Counted(engine) as counted:
            assert engine.complete(asked).tokens == computed.tokens
        assert counted.local_hits == 150 // BLOCK_TOKENS * BLOCK_TOKENS
        engine.reset_prefix_cache()
        with Counted(engine) as counted:
            assert engine.complete(asked).tokens == computed.tokens
        assert counted.local_hits == 0
        family = engine.child.family()
        assert len(family) > 1
    assert not any(member.is_running() for member in family)
