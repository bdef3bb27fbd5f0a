//! `keelson-cni`, the plugin. One thread, no child processes: a pod waits for this program to end.

fn main() -> std::process::ExitCode {
    keelson_cni::plugin::main()
}
