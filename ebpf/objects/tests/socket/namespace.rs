//! The program that tells the number of a network namespace where sockets do not.

use keelson_netlink::netns::Netns;

use super::cgroup;
use super::cookie::{cookie, told_by_program};

#[test]
fn the_program_says_what_sockets_say() {
    let cgroup = cgroup::mount().unwrap();
    let namespaces = [Netns::current().unwrap(), Netns::anonymous().unwrap()];
    let numbers = namespaces.each_ref().map(|netns| told_by_program(netns, &cgroup).unwrap());
    assert_ne!(numbers[0], numbers[1]);
    for (netns, number) in namespaces.iter().zip(numbers) {
        assert_eq!(told_by_program(netns, &cgroup).unwrap(), number);
        assert_eq!(cookie(netns, &cgroup).unwrap(), number);
    }
}
