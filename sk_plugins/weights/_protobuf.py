"""Classes of protocol buffers from a few declared fields, at run time; the rest of a file is skipped."""

from collections.abc import Mapping

__all__ = ['message_class']

# Message -> field -> its number and its type: a scalar's or a message's name, with 'repeated' or 'packed' after it.
Schema = Mapping[str, Mapping[str, tuple[int, str]]]


def message_class(package: str, schema: Schema, name: str) -> type:
    """The class of the message ``name``, as far as ``schema`` declares it.

    Raises:
        ImportError: ``protobuf`` is not installed.
    """
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
