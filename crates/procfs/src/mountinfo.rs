//! `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A mount of a mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The folder of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// `tmpfs`, `cgroup2`, …
    pub kind: String,
    /// The mount's own options, such as `rw`.
    pub options: Vec<String>,
    /// The file system's options, such as the controllers of a cgroup hierarchy.
    pub super_options: Vec<String>,
}

/// The mounts of this process's namespace, in the order in which they were made.
///
/// # Errors
/// When the kernel refuses to show them.
pub fn own_mounts() -> io::Result<Vec<Mount>> {
    Ok(mounts(&std::fs::read("/proc/self/mountinfo")?).collect())
}

/// The mounts in the text of a mountinfo file. Lines of another shape are skipped.
pub fn mounts(text: &[u8]) -> impl Iterator<Item = Mount> {
    text.split(|byte| *byte == b'\n').filter_map(mount)
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: any number of optional fields comes
/// before the lone hyphen.
fn mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = path(fields.nth(3)?);
    let point = path(fields.next()?);
    let options = list(fields.next()?);
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let super_options = fields.nth(1).map(list).unwrap_or_default();
    Some(Mount { root, point, kind, options, super_options })
}

fn list(field: &[u8]) -> Vec<String> {
    field.split(|byte| *byte == b',').map(|o| String::from_utf8_lossy(o).into_owned()).collect()
}

/// The kernel writes space, tab, newline and backslash as a backslash and three octal digits, and all other bytes as they
/// are.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_that_is_not_utf8_hides_no_other_mount() {
        let text = b"22 1 0:20 / /proc rw,nosuid - proc proc rw\n\
            36 35 98:0 /pods/\xff /a\\040b\\134c rw,noatime shared:1 master:2 - tmpfs tmpfs rw,size=4k\n\
            nonsense\n\
            37 35 0:30 / /sys/fs/cgroup ro - cgroup2 cgroup2 rw,nsdelegate\n";
        let found: Vec<Mount> = mounts(text).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[1].root.as_os_str(), OsStr::from_bytes(b"/pods/\xff"));
        assert_eq!(found[1].point, PathBuf::from("/a b\\c"));
        assert_eq!(found[1].kind, "tmpfs");
        assert_eq!(found[1].super_options, ["rw", "size=4k"]);
        assert_eq!(found[2].options, ["ro"]);
    }

    #[test]
    fn the_mounts_of_this_process_are_read() {
        assert!(own_mounts().unwrap().iter().any(|mount| mount.point.ends_with("proc")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(text: Vec<u8>) {
            mounts(&text).for_each(drop);
        }

        #[test]
        fn a_path_survives_the_kernels_escapes(name in prop::collection::vec(1..=255_u8, 1..40)) {
            let mut field = Vec::new();
            for byte in &name {
                match byte {
                    b' ' | b'\t' | b'\n' | b'\\' => {
                        field.extend(format!("\\{byte:03o}").bytes());
                    }
                    other => field.push(*other),
                }
            }
            let read = path(&field);
            prop_assert_eq!(read.as_os_str().as_bytes(), &name[..]);
        }
    }
}
