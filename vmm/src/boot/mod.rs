//! What is in guest memory and in the first vCPU when a guest begins: a kernel image, its command line and initial RAM
//! file system, the zero page, the MP table or the devicetree, and the registers of the 64-bit boot protocol.

pub mod command_line;
pub mod device_tree;
pub mod kernel;
pub mod mp_table;
pub mod registers;
pub mod zero_page;
