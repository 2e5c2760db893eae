"""Calls to an OpenAI-compatible chat endpoint that replies in JSON, bounded in time and in bytes.

There are two kinds of failure, after each of which the call is retried. `JudgeFailed`: the endpoint failed (no
connection, no reply in time, a server error, a body that is no chat completion). `NoVerdict`: the judge replied, but
without a verdict. After either, the response is still unscored, not scored 0.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp

from megatron_r1.config.reward import JudgeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.platform.api_keys import api_key
from megatron_r1.rewards.judge.questions import Ask, NoVerdict

KEY = "JUDGE_API_KEY"
WRONG_SETTINGS = (401, 403, 404, 405)
"""HTTP statuses that are the same for every query: wrong key or wrong address."""
REFUSALS = (400, 413, 422)
"""HTTP statuses that refuse this query, so that a retry is useless."""
CONNECT_S = 10.0
FIRST_PAUSE_S = 0.2
BYTES_A_TOKEN = 64
LARGEST_REPLY = 1 << 20
"""Bytes of a reply beyond those for its tokens."""


class JudgeFailed(Exception):
    """The endpoint gave no usable reply."""


class JudgeRefused(JudgeFailed):
    """The endpoint refuses this query; a retry would not help."""


class Judge:
    """Client of one endpoint; several threads may use it.

    Attributes:
        counts: calls, verdicts, endpoint failures (failed) and replies without a verdict (no_verdict), so far.
    """

    def __init__(self, config: JudgeConfig):
        """
        Raises:
            ConfigError: no endpoint is named.
        """
        if not config.url:
            raise ConfigError("reward.judge_config.url", "", "must name an endpoint, such as http://host:port/v1")
        self._config = config
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        key = api_key(KEY)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.counts: Counter[str] = Counter()

    def ask_all(self, queries: Sequence[Ask]) -> list[Any]:
        """For each query the verdict, or the JudgeFailed or NoVerdict exception; in order.

        Raises:
            ConfigError: the endpoint refuses the key, or there is no endpoint at the URL.
        """
        return asyncio.run(self._ask_all(queries))

    async def _ask_all(self, queries: Sequence[Ask]) -> list[Any]:
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s, sock_connect=CONNECT_S)
        slots = asyncio.Semaphore(self._config.concurrency)

        async def one(query: Ask) -> Any:
            async with slots:
                try:
                    return await self._ask(session, query)
                except (JudgeFailed, NoVerdict) as error:
                    return error

        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            tasks = [asyncio.create_task(one(query)) for query in queries]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    async def _ask(self, session: aiohttp.ClientSession, query: Ask) -> Any:
        last: Exception = JudgeFailed("no call was made")
        for attempt in range(self._config.attempts):
            if attempt and isinstance(last, JudgeFailed):
                await asyncio.sleep(FIRST_PAUSE_S * 4 ** (attempt - 1))
            self.counts["calls"] += 1
            try:
                verdict = query.verdict_in(await self._content(session, query))
            except NoVerdict as error:
                self.counts["no_verdict"] += 1
                last = error
            except (JudgeFailed, aiohttp.ClientError, TimeoutError, OSError) as error:
                self.counts["failed"] += 1
                if isinstance(error, JudgeRefused):
                    raise
                reason = error if isinstance(error, JudgeFailed) else f"{type(error).__name__} {error}".strip()
                last = JudgeFailed(reason)
            else:
                self.counts["verdicts"] += 1
                return verdict
        raise last

    async def _content(self, session: aiohttp.ClientSession, query: Ask) -> str:
        """The text of one reply."""
        config = self._config
        body = {
            "model": config.model,
            "messages": query.messages,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "response_format": query.response_format(config.analysis_characters),
        }
        # A redirect would send the key to another server.
        async with session.post(self._url, json=body, allow_redirects=False) as response:
            self._check(response.status)
            most = LARGEST_REPLY + BYTES_A_TOKEN * config.max_tokens
            content = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                content += chunk
                if len(content) > most:
                    raise JudgeFailed(f"a reply of more than {most} bytes")
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise JudgeFailed("a reply that is no chat completion") from None
        if not isinstance(text, str):
            raise NoVerdict("the reply is empty")
        return text

    def _check(self, status: int) -> None:
        if status in WRONG_SETTINGS:
            allowed = f"must be an endpoint that accepts the key in {KEY}: it replies with status {status}"
            raise ConfigError("reward.judge_config.url", self._config.url, allowed)
        if status in REFUSALS:
            raise JudgeRefused(f"status {status}")
        if status != 200:
            raise JudgeFailed(f"status {status}")
