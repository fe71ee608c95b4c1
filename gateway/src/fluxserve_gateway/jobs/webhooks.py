"""Tell a caller's host that a job has ended, signed as Standard Webhooks (standardwebhooks.com) says.

Deliveries are durable: any gateway takes those that are due. A receiver may get one twice, with the same `webhook-id`.
No redirect is followed and no answer read; a try has a bounded time, and there is a bounded number of them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp

from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.receivers import PublicResolver, Receivers
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.jobs.store import Job, Store

log = logging.getLogger("fluxserve_gateway")

_AT_A_TIME = 8
_GONE = 410  # the receiver wants no more


def secret_of(master: bytes, owner: str) -> str:
    """Derive the secret of one key: its receiver cannot sign for another key."""
    derived = hmac.new(master, b"fluxserve webhook " + owner.encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(derived).decode()}"


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Sign a message: the header `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"


class Webhooks:
    """Delivers what is due."""

    def __init__(
        self,
        settings: JobSettings,
        database: Database,
        store: Store,
        describe: Callable[[Job], dict[str, Any]],
        count: Callable[[str], None],
    ) -> None:
        """Make a deliverer.

        Args:
            settings: the receivers and the bounds.
            database: on whose threads the store runs.
            store: what is due.
            describe: the job as its owner sees it.
            count: called with "delivered", "failed" or "given_up" after each try.
        """
        self._settings = settings
        self._database, self._store = database, store
        self._describe, self._count = describe, count
        self._receivers = Receivers(settings.webhook_origins, private=settings.webhook_private)

    async def run(self) -> None:
        """Deliver until cancelled."""
        resolver = None if self._settings.webhook_private else PublicResolver()
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self._settings.webhook_timeout)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        ) as session:
            while True:
                try:
                    due = await self._database.run_own(
                        self._store.claim_deliveries, _AT_A_TIME, 2 * self._settings.webhook_timeout
                    )
                    await asyncio.gather(*(self._deliver(session, job) for job in due))
                except Exception as error:  # noqa: BLE001 (the next round must come)
                    log.warning("webhooks: %s", error)
                    due = []
                if not due:
                    await asyncio.sleep(self._settings.poll)

    async def _deliver(self, session: aiohttp.ClientSession, job: Job) -> None:
        retries = self._settings.webhook_retries
        # more tries than that were begun by gateways that were lost meanwhile
        outcome = await self._try(session, job) if job.webhook_tries <= len(retries) else "given_up"
        retry_in = None
        if outcome == "failed":
            retry_in = retries[job.webhook_tries] if job.webhook_tries < len(retries) else None
            outcome = "given_up" if retry_in is None else outcome
        self._count(outcome)
        await self._database.run_own(self._store.delivered, job, retry_in)

    async def _try(self, session: aiohttp.ClientSession, job: Job) -> str:
        """Send one message. The allow-list may have changed since the job was taken in, so it is asked again."""
        url = str(job.webhook)
        if not self._receivers.allow(url):
            return "given_up"
        now, message_id = int(time.time()), f"msg_{job.id}"
        ended = datetime.fromtimestamp(job.ended or now, UTC).isoformat().replace("+00:00", "Z")
        message = {"type": f"job.{job.status}", "timestamp": ended, "data": self._describe(job)}
        body = json.dumps(message).encode()
        headers = {
            "content-type": "application/json",
            "user-agent": "fluxserve-gateway",
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(secret_of(self._settings.webhook_secret, job.owner), message_id, now, body),
        }
        try:
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                status = answer.status
                answer.close()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            log.warning("webhook of %s: %s: %s", job.id, type(error).__name__, error)
            return "failed"
        if 200 <= status < 300:
            return "delivered"
        log.warning("webhook of %s: its receiver answered %d", job.id, status)
        return "given_up" if status == _GONE else "failed"
