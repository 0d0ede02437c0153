"""Calls middleware around a handler, each one deciding whether and how the next one is called."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

import anyio

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import InvalidSettings
from s3queue_async.message import Context, Tracing
from s3queue_async.worker import Decoder, Handler, HandlerFunction

PayloadT = TypeVar("PayloadT")


class Delivery(Generic[PayloadT]):
    """A message on its way to the handler, as middleware sees it.

    Attributes:
        payload: The decoded payload; what middleware puts here is what the next one and the handler get.
        context: As the handler would get it.
        shared: The queue's clock, chance, settings and store, which the ready middleware goes by.
    """

    __slots__ = ("_limiter", "context", "payload", "shared")

    def __init__(self, payload: PayloadT, context: Context, shared: Shared, limiter: anyio.CapacityLimiter) -> None:
        self.payload = payload
        self.context = context
        self.shared = shared
        self._limiter = limiter

    @property
    def id(self) -> str:
        return self.context.message_id

    def __repr__(self) -> str:
        return f"Delivery({self.payload!r}, {self.context!r})"


CallNext = Callable[[Delivery[Any]], Awaitable[Any]]
Middleware = Callable[[Delivery[Any], CallNext], Coroutine[Any, Any, Any]]


class WrappedHandler(Handler):
    """A handler inside its middleware; tracing goes around all of it.

    Args:
        function, decode, tracing: As for Handler.
        middleware: The first one is the outermost.
        shared: What the queue's parts have in common.
    """

    def __init__(
        self,
        function: HandlerFunction,
        decode: Decoder,
        tracing: Tracing | None,
        middleware: Sequence[Middleware],
        shared: Shared,
    ) -> None:
        super().__init__(function, decode, tracing)
        self.wants_context = True
        self._shared = shared
        enter: CallNext = self._innermost
        for layer in reversed(middleware):
            enter = _around(layer, enter)
        self._enter = enter

    def _call(self, payload: Any, context: Context | None, limiter: anyio.CapacityLimiter) -> Coroutine[Any, Any, Any]:
        assert context is not None
        return self._through(Delivery(payload, context, self._shared, limiter))

    async def _through(self, delivery: Delivery[Any]) -> Any:
        return await self._enter(delivery)

    def _innermost(self, delivery: Delivery[Any]) -> Awaitable[Any]:
        return super()._call(delivery.payload, delivery.context, delivery._limiter)


def _around(layer: Middleware, call_next: CallNext) -> CallNext:
    def call(delivery: Delivery[Any]) -> Awaitable[Any]:
        return layer(delivery, call_next)

    return call


def make_handler(
    function: HandlerFunction,
    decode: Decoder,
    tracing: Tracing | None,
    middleware: Sequence[Middleware],
    shared: Shared,
) -> Handler:
    """The handler as the worker runs it; without middleware that is the handler itself, and nothing is called more."""
    if not middleware:
        return Handler(function, decode, tracing)
    return WrappedHandler(function, decode, tracing, middleware, shared)


def checked_middleware(layer: Any) -> Middleware:
    """The middleware, if it can be one.

    Raises:
        InvalidSettings: It is not async, or cannot be called with ``(message, call_next)``.
    """
    name = getattr(layer, "__qualname__", repr(layer))
    if isinstance(layer, type) or not callable(layer):
        raise InvalidSettings(
            f"The middleware {name} is not a function.",
            suggestion="Pass 'async def middleware(message, call_next)', or an object that is called like that "
            "(of a class: an instance, not the class).",
        )
    call = getattr(layer, "__call__", None)  # noqa: B004 - the method itself is looked at, not whether it exists
    if not inspect.iscoroutinefunction(layer) and not inspect.iscoroutinefunction(call):
        raise InvalidSettings(f"The middleware {name} is not async.", suggestion="Define it with 'async def'.")
    try:
        inspect.signature(layer).bind(object(), object())
    except TypeError as error:
        raise InvalidSettings(
            f"The middleware {name} cannot be called with (message, call_next): {error}.",
            suggestion="Give it these two parameters.",
        ) from None
    checked: Middleware = layer
    return checked
