//! Routing rules: which packets consult which table.

use libc::{RTM_DELRULE, RTM_GETRULE, RTM_NEWRULE};

use super::{AF_INET, AF_INET6, Rtnl, created, existed};
use crate::message::{Message, Reply};
use crate::socket::NetlinkError;

const FRA_IIFNAME: u16 = 3;
const FRA_GOTO: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;

/// The length of `struct fib_rule_hdr`.
const HEADER: usize = 12;
const EXCLUSIVE_CREATE: u16 = 0x600;

/// What a packet that fits does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleAction {
    /// Consults this table, and goes on with the next rule when it has no route there.
    Table(u32),
    /// Goes on with the rule of this priority.
    Goto(u32),
    /// Goes on.
    Nothing,
}

/// A routing rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingRule {
    /// For IPv6, else for IPv4.
    pub ipv6: bool,
    /// Rules are tried in this order.
    pub priority: u32,
    /// Only packets with these bits in their mark: value and mask.
    pub mark: Option<(u32, u32)>,
    /// Only packets that came in there; `lo` stands for those that this host makes.
    pub input: Option<String>,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// What to do.
    pub action: RuleAction,
}

impl RoutingRule {
    fn message(&self, kind: u16, flags: u16) -> Message {
        const TO_TABLE: u8 = 1;
        const GOTO: u8 = 2;
        const NOP: u8 = 3;
        let mut header = [0; HEADER];
        header[0] = if self.ipv6 { AF_INET6 } else { AF_INET };
        header[7] = match self.action {
            RuleAction::Table(_) => TO_TABLE,
            RuleAction::Goto(_) => GOTO,
            RuleAction::Nothing => NOP,
        };
        let mut message = Message::new(kind, flags, &header);
        message.attr_u32(FRA_PRIORITY, self.priority);
        message.attr(FRA_PROTOCOL, &[self.protocol]);
        if let Some((value, mask)) = self.mark {
            message.attr_u32(FRA_FWMARK, value).attr_u32(FRA_FWMASK, mask);
        }
        if let Some(input) = &self.input {
            message.attr_text(FRA_IIFNAME, input);
        }
        match self.action {
            RuleAction::Table(table) => message.attr_u32(FRA_TABLE, table),
            RuleAction::Goto(target) => message.attr_u32(FRA_GOTO, target),
            RuleAction::Nothing => &mut message,
        };
        message
    }

    pub(crate) fn parse(reply: &Reply<'_>) -> Option<Self> {
        let header = &reply.payload;
        let attrs = reply.attrs(HEADER);
        let ipv6 = match *header.first()? {
            AF_INET => false,
            AF_INET6 => true,
            _ => return None,
        };
        let action = match *header.get(7)? {
            1 => RuleAction::Table(
                attrs.u32(FRA_TABLE).or_else(|| header.get(4).copied().map(u32::from))?,
            ),
            2 => RuleAction::Goto(attrs.u32(FRA_GOTO)?),
            3 => RuleAction::Nothing,
            _ => return None,
        };
        let mark = attrs.u32(FRA_FWMARK).filter(|mark| *mark != 0);
        Some(Self {
            ipv6,
            priority: attrs.u32(FRA_PRIORITY).unwrap_or(0),
            mark: mark.map(|mark| (mark, attrs.u32(FRA_FWMASK).unwrap_or(u32::MAX))),
            input: attrs.text(FRA_IIFNAME),
            protocol: attrs.find(FRA_PROTOCOL).and_then(|bytes| bytes.first().copied())?,
            action,
        })
    }
}

impl Rtnl {
    /// The rules of both families that look a table up, go on elsewhere, or do nothing.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn rules(&mut self) -> Result<Vec<RoutingRule>, NetlinkError> {
        let replies = self.socket.dump(&Message::new(RTM_GETRULE, 0, &[0; HEADER]))?;
        Ok(replies.iter().filter_map(RoutingRule::parse).collect())
    }

    /// Adds a rule. Answers whether it is new.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add_rule(&mut self, rule: &RoutingRule) -> Result<bool, NetlinkError> {
        created(self.perform(rule.message(RTM_NEWRULE, EXCLUSIVE_CREATE)))
    }

    /// Deletes a rule. Answers whether it was there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn delete_rule(&mut self, rule: &RoutingRule) -> Result<bool, NetlinkError> {
        existed(self.perform(rule.message(RTM_DELRULE, 0)))
    }
}
