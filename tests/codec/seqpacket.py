"""ZDS packets with descriptors, on sockets of the operating system: nothing of the program under test is used."""

import array
import os
import socket

from support import PATIENCE

# What either end of the protocol offers a packet.
ROOM = 1024


class Packets:
    """One connection."""

    def __init__(self, connection):
        self.connection = connection
        connection.settimeout(PATIENCE)

    def send(self, data, fds=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.connection.sendmsg([data], rights)

    def receive(self):
        """A packet and its descriptors; none at the end of the connection."""
        space = socket.CMSG_SPACE(4 * array.array("i").itemsize)
        data, rights, flags, _ = self.connection.recvmsg(ROOM, space)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a packet of more than 1024 bytes"
        fds = array.array("i")
        for level, kind, content in rights:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        return data, list(fds)

    def ended(self):
        """Whether the other end has closed, in time."""
        try:
            data, fds = self.receive()
        except ConnectionResetError:
            return True
        for fd in fds:
            os.close(fd)
        assert not data, f"a packet where the connection ends: {data.hex()}"
        return True

    def close(self):
        self.connection.close()


def listen(path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(8)
    listener.settimeout(PATIENCE)
    return listener


def connect(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    return Packets(connection)
