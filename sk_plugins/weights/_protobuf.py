"""Protocol buffers by a few declared fields, at run time; the rest of a file is skipped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._resources import how_to_install

__all__ = ['message_class', 'read_message']

# Message -> field -> its number and its type: a scalar's or a message's name, with 'repeated' or 'packed' after it.
Schema = Mapping[str, Mapping[str, tuple[int, str]]]


def read_message(path: Path, make_class: Callable[[], type], kind: str) -> Any:
    """The message that a file is.

    Args:
        path: of the file.
        make_class: makes its class, by :func:`message_class`.
        kind: what the file should be, for errors: 'a .caffemodel'.

    Raises:
        ImportError: ``protobuf`` is not installed.
        ValueError: the file is damaged or something else.
    """
    try:
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError(f'{path}: {kind} is read with protobuf: {how_to_install("caffe")}') from error
    try:
        return make_class().FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f'{path}: not {kind}, or a damaged one: {error}') from error


def message_class(package: str, schema: Schema, name: str) -> type:
    """The class of the message ``name``, as far as ``schema`` declares it; it takes ``protobuf``."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f'sk_plugins/{package}.proto', package=package, syntax='proto2')
    kinds = descriptor_pb2.FieldDescriptorProto
    for message_name, fields in schema.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, kind) in fields.items():
            kind, _, plural = kind.partition(' ')
            field = message.field.add(name=field_name, number=number)
            field.label = kinds.LABEL_REPEATED if plural else kinds.LABEL_OPTIONAL
            if kind in schema:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f'.{package}.{kind}'
            else:
                field.type = getattr(kinds, f'TYPE_{kind.upper()}')
            field.options.packed = plural == 'packed'
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'{package}.{name}'))
