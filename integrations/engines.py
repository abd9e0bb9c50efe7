"""Serving engines that have their own way to load plugins: vLLM.

vLLM calls load() in each of its processes before it looks for DeepEP (entry point group
`vllm.general_plugins`). docs/engines.md has the command lines.
"""

from __future__ import annotations

from ep_runtime import env


def load() -> None:
    """With EP_AS_DEEP_EP=1 in the environment, let `import deep_ep` mean ep_runtime.

    Without it nothing happens: to have the package installed must not change what an engine does.
    Raises SequenceError if another deep_ep was imported before.
    """
    if not env.as_deep_ep():
        return
    from ep_runtime.integrations.deep_ep.install import install, install_for_children

    install()
    install_for_children()
