//! podferry in the place of runc: what containerd's shim calls for the pods of the runtime class `podferry`.
//!
//! `podferry-runtime` becomes the node's own runc for all it is asked, but for six things:
//!
//! | asked | what it does |
//! |---|---|
//! | `create` of a container whose pod is annotated `podferry.dev/migration` | asks the node's agent, waits, and runs `runc restore` as that says: the restored container is the shim's child, as one is that was created |
//! | `start` of such a container | nothing: it runs already |
//! | `create` in a pod that moves away, or has | refuses: its container runs elsewhere, and the kubelet would start a second one |
//! | `kill` of a container that stands still to be moved | nothing, as long as the agent says so, and for a quarter of an hour at most when it is gone: its probes fail, and its memory is needed |
//! | `kill` of a sandbox whose pod has moved, and some of whose connections live on | notes that it was asked to, as long as the agent says so: with the sandbox its address would go. The agent ends it when they have ended |
//! | `delete` of a container | first unmounts what a restore that did not come to its end has mounted in runc's folder of it: runc would empty that |
//!
//! A container that came is restored once. When it ends and the kubelet starts it again, it is created as any other: a mark beside the
//! sandbox's bundle says that it has come ([`Mark`]).
//!
//! The agent may be killed and started again at any time. Before it has said anything the wrapper looks for it again, until
//! its time is over; the kubelet waits for two minutes at most (`runtimeRequestTimeout`) and asks anew ten seconds later. Once runc
//! restores, the wrapper waits for its end alone.
//!
//! Its standard output and error are the container's: it is silent, and says what is wrong in the shim's log (`--log`), from which the
//! kubelet has it.

mod arguments;
mod bundle;
mod fence;
mod messages;
mod run;
mod settings;

pub use arguments::{Invoked, WrongArguments};
pub use bundle::{ARRIVED_MARK, MIGRATION, Mark, PodContainer};
pub use fence::{KEEP, STAY, SandboxEnd, asked, fence_of};
pub use messages::{Hello, Order, Report, VERSION, WrongMessage, read, write};
pub use run::run;
pub use settings::{Settings, WrongSettings};
