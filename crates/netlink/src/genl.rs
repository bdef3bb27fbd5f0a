//! Generic netlink: kernel parts that have no netlink protocol number of their own are found by name.

use nix::errno::Errno;

use crate::message::{Message, u16_at};
use crate::socket::{NetlinkError, Socket};

/// The family that knows the others (`GENL_ID_CTRL`).
const CONTROLLER: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_VERSION: u8 = 2;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// The length of `struct genlmsghdr`.
pub(crate) const HEADER: usize = 4;

/// A message of a family; `command` and `version` are the family's own.
pub(crate) fn message(family: u16, command: u8, version: u8) -> Message {
    Message::new(family, 0, &[command, version, 0, 0])
}

/// The number of a family; `None` when the kernel has none of that name. The kernel may load a module for it.
pub(crate) fn family(socket: &mut Socket, name: &str) -> Result<Option<u16>, NetlinkError> {
    let mut question = message(CONTROLLER, CTRL_CMD_GETFAMILY, CTRL_VERSION);
    question.attr_text(CTRL_ATTR_FAMILY_NAME, name);
    match socket.ask(question) {
        Ok(reply) => {
            let number = reply.attrs(HEADER).find(CTRL_ATTR_FAMILY_ID).and_then(|b| u16_at(b, 0));
            number.map(Some).ok_or(NetlinkError::Malformed("a family without a number"))
        }
        Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Protocol;

    #[test]
    fn families_are_found_by_name() {
        let mut socket = Socket::open(Protocol::Generic).unwrap();
        assert_eq!(family(&mut socket, "nlctrl").unwrap(), Some(CONTROLLER));
        assert_eq!(family(&mut socket, "no-such-family").unwrap(), None);
    }
}
