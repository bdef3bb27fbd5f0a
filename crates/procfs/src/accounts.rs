//! `/etc/passwd` and `/etc/group` (passwd(5), group(5)), which an image may fill with anything.

/// A line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User<'a> {
    pub name: &'a [u8],
    pub uid: u32,
    pub gid: u32,
    pub home: &'a [u8],
}

/// A line of `/etc/group`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group<'a> {
    pub name: &'a [u8],
    pub gid: u32,
    pub members: Vec<&'a [u8]>,
}

/// The users in the text of a passwd file. Lines of another shape are skipped.
pub fn users(text: &[u8]) -> impl Iterator<Item = User<'_>> {
    lines(text).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?)?;
        let gid = number(fields.next()?)?;
        let home = fields.nth(1).unwrap_or_default();
        Some(User { name, uid, gid, home })
    })
}

/// The groups in the text of a group file. Lines of another shape are skipped.
pub fn groups(text: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(text).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        let members = fields.next().unwrap_or_default().split(|byte| *byte == b',');
        let members = members.map(<[u8]>::trim_ascii).filter(|member| !member.is_empty()).collect();
        Some(Group { name, gid, members })
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"))
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_another_shape_are_skipped() {
        let passwd = b"# comment\nroot:x:0:0:root:/root:/bin/sh\nbad\n:x:1:1::/:\n\xff:x:7:8::/home/\xff\nx:y:-1:0::/:\n";
        let found: Vec<_> = users(passwd).map(|u| (u.name, u.uid, u.gid, u.home)).collect();
        let root: (&[u8], u32, u32, &[u8]) = (b"root", 0, 0, b"/root");
        assert_eq!(found, [root, (b"\xff", 7, 8, b"/home/\xff")]);
        let found: Vec<_> = groups(b"staff:x:50: web,,\nroot:x:0\n").collect();
        assert_eq!(found[0].members, [b"web"]);
        assert_eq!((found[1].gid, found[1].members.len()), (0, 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(text: Vec<u8>) {
            users(&text).for_each(drop);
            groups(&text).for_each(drop);
        }
    }
}
