"""The clients and the versions that they are tried with: the newest of ``DATE`` that Python 3.11
and Node 20 take.

Each client has an environment of its own, named by its script, ``use_NAME``.  The first package is
the client; what the packages require is not newer than ``DATE`` either.
"""

DATE = "2026-11-26"
UV = "uv==0.13.9"
PYTHON = {
    "openai": ["openai==3.57.0"],
    "anthropic": ["anthropic==2.14.0"],
    "litellm": ["litellm==1.110.2"],
    "langchain_openai": ["langchain-openai==1.7.4"],
    # Later clients of Anthropic's have no class that it makes.
    "pydantic_ai": ["pydantic-ai-slim[openai,anthropic]==2.38.0", "anthropic==1.17.0"],
    "instructor": ["instructor==1.17.0"],
    "smolagents": ["smolagents[openai]==1.26.0"],
    "openai_agents": ["openai-agents==0.24.0"],
    "llm": ["llm==0.36"],
    "autogen": ["autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5"],
    "lm_eval": ["lm-eval[api]==0.4.13", "transformers==5.24.0"],
    "aiperf": ["aiperf==0.13.0"],
    "coding_agent": [],  # the standard library alone
}
NODE = {
    "openai": ["openai@6.49.0", "zod@4.6.7"],
    "anthropic": ["@anthropic-ai/sdk@1.14.0"],
    "ai_sdk": [
        "ai@6.0.326",
        "@ai-sdk/openai@3.0.141",
        "@ai-sdk/openai-compatible@2.0.92",
        "@ai-sdk/anthropic@3.0.140",
        "zod@4.6.7",
    ],
    "codex": ["@openai/codex@0.169.0"],
    "opencode": ["opencode-ai@1.18.33"],
}
