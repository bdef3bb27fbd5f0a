//! BPF programs as classifiers of a link, in the way that kernels before 6.6 have: a clsact queueing discipline with
//! filters at both directions.

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{
    NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, RTM_DELQDISC, RTM_DELTFILTER, RTM_GETTFILTER,
    RTM_NEWQDISC, RTM_NEWTFILTER,
};

use nix::errno::Errno;

use super::{Rtnl, created, existed};
use crate::message::{Message, Reply, u32_at};
use crate::socket::NetlinkError;

/// The length of `struct tcmsg`.
const HEADER: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
/// The program's answer is the verdict.
const DIRECT_ACTION: u32 = 1;
const CLSACT: u32 = 0xffff_0000;
const PARENT_OF_CLSACT: u32 = 0xffff_fff1;
/// In front of what others have: 49152 is the kernel's first choice.
const PRIORITY: u32 = 27493;
const HANDLE: u32 = 1;
const ALL_PROTOCOLS: u16 = 3;

/// Which packets a classifier sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Those that arrive.
    Ingress,
    /// Those that leave.
    Egress,
}

impl Direction {
    fn parent(self) -> u32 {
        match self {
            Self::Ingress => CLSACT | 0xfff2,
            Self::Egress => CLSACT | 0xfff3,
        }
    }
}

/// A BPF program that is a classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classifier {
    /// The name that it was given.
    pub name: String,
    /// The program's number.
    pub program: u32,
    /// At our place among the filters.
    pub ours: bool,
}

fn header(link: u32, handle: u32, parent: u32, info: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    for (index, word) in [link, handle, parent, info].into_iter().enumerate() {
        let start = 4 + 4 * index;
        bytes[start..start + 4].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn filter_header(link: u32, direction: Direction) -> [u8; HEADER] {
    let info = PRIORITY << 16 | u32::from(ALL_PROTOCOLS.to_be());
    header(link, HANDLE, direction.parent(), info)
}

impl Classifier {
    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let attrs = reply.attrs(HEADER);
        let options = attrs.nested(TCA_OPTIONS)?;
        let (handle, info) = (u32_at(&reply.payload, 8)?, u32_at(&reply.payload, 16)?);
        Some(Self {
            name: options.text(TCA_BPF_NAME)?,
            program: options.u32(TCA_BPF_ID)?,
            ours: handle == HANDLE && info >> 16 == PRIORITY,
        })
    }
}

impl Rtnl {
    /// Puts a program in our place, in that of an earlier one between two packets.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn set_classifier(
        &mut self,
        link: u32,
        direction: Direction,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), NetlinkError> {
        let create = (NLM_F_CREATE | NLM_F_EXCL) as u16;
        let mut qdisc =
            Message::new(RTM_NEWQDISC, create, &header(link, CLSACT, PARENT_OF_CLSACT, 0));
        qdisc.attr_text(TCA_KIND, "clsact");
        created(self.perform(qdisc))?;
        let replace = (NLM_F_CREATE | NLM_F_REPLACE) as u16;
        let mut filter = Message::new(RTM_NEWTFILTER, replace, &filter_header(link, direction));
        filter.attr_text(TCA_KIND, "bpf");
        filter.nest(TCA_OPTIONS, |options| {
            options.attr_u32(TCA_BPF_FD, program.as_raw_fd().unsigned_abs());
            options.attr_text(TCA_BPF_NAME, name);
            options.attr_u32(TCA_BPF_FLAGS, DIRECT_ACTION);
        });
        self.perform(filter)
    }

    /// The BPF classifiers of a link in one direction.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn classifiers(
        &mut self,
        link: u32,
        direction: Direction,
    ) -> Result<Vec<Classifier>, NetlinkError> {
        let question = Message::new(RTM_GETTFILTER, 0, &header(link, 0, direction.parent(), 0));
        match self.socket.dump(&question) {
            Ok(replies) => Ok(replies.iter().filter_map(Classifier::parse).collect()),
            // Without the discipline there is no such parent.
            Err(error) if error.is_absent() || is_invalid(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Takes our program away; answers whether there was one. The discipline goes with its last filter.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn remove_classifier(
        &mut self,
        link: u32,
        direction: Direction,
    ) -> Result<bool, NetlinkError> {
        if !self.classifiers(link, direction)?.iter().any(|found| found.ours) {
            return Ok(false);
        }
        self.perform(Message::new(RTM_DELTFILTER, 0, &filter_header(link, direction)))?;
        let mut left = self.classifiers(link, Direction::Ingress)?;
        left.extend(self.classifiers(link, Direction::Egress)?);
        if left.is_empty() {
            let qdisc = header(link, CLSACT, PARENT_OF_CLSACT, 0);
            existed(self.perform(Message::new(RTM_DELQDISC, 0, &qdisc)))?;
        }
        Ok(true)
    }
}

fn is_invalid(error: &NetlinkError) -> bool {
    error.errno() == Some(Errno::EINVAL)
}
