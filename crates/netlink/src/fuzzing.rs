//! What `fuzz/` calls: every reader of netlink replies. Each takes any bytes and panics when an invariant does not hold.
//! No program of keelson calls them, so they are in none.

use crate::message::{Replies, Reply};
use crate::nft::batch::messages;
use crate::{conntrack, ipvs, nft, route, sock_diag, socket};

fn replies(input: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    Replies::new(input).take(64)
}

/// Reading it is all that is wanted.
fn ignore<T>(_: Option<T>) {}

/// Links, addresses, routes, neighbours, rules, classifiers, and the events of all of them.
pub fn routes(input: &[u8]) {
    for reply in replies(input) {
        ignore(route::Link::parse(&reply));
        ignore(route::Address::parse(&reply));
        ignore(route::Neighbour::parse(&reply));
        ignore(route::Route::parse(&reply));
        ignore(route::RoutingRule::parse(&reply));
        ignore(route::Classifier::parse(&reply));
        ignore(route::Event::parse(&reply));
        drop(socket::refusal(&reply, 0));
    }
}

/// Tracked connections: their attributes come from traffic.
pub fn conntrack(input: &[u8]) {
    for (_, _, message) in messages(input) {
        if let Some(flow) = conntrack::read_flow(message) {
            assert_eq!(flow.source.is_ipv4(), flow.source.ip().is_ipv4());
        }
    }
}

/// nftables: elements, announcements and refusals.
pub fn nftables(input: &[u8]) {
    for (kind, _, message) in messages(input) {
        let _announcement = nft::Announcement::parse(kind, message);
        drop(nft::extended_acknowledgement(message));
        let body = message.get(nft::batch::HEADER_LEN..).unwrap_or_default();
        for (_, list) in nft::attribute::Reader::new(body) {
            for (_, element) in nft::attribute::Reader::new(list) {
                let _element = nft::dump::read_element(element);
            }
            let _stamp = nft::find_user_data(list, 0);
        }
    }
}

/// Virtual and real servers of IPVS.
pub fn virtual_servers(input: &[u8]) {
    for reply in replies(input) {
        if let Some(found) = ipvs::wire::read_virtual(&reply) {
            let _real = ipvs::wire::read_real(&reply, found.key);
        }
    }
}

/// Sockets of others.
pub fn sockets(input: &[u8]) {
    for reply in replies(input) {
        ignore(sock_diag::UdpSocket::parse(&reply));
    }
}
