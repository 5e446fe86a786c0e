package fs

// Resized makes the kernel ask for the Device's size again, which has grown. Without
// it the kernel goes on with the former one for as long as it may believe attributes.
// What it does then on its own depends on its version, so whoever needs the new size
// in a file that is open already, such as a loop device, stats the image first.
func (s *Server) Resized() { s.resized() }

// forgetAttributes makes the kernel forget the image's attributes. It may know nothing
// of the image or the mount any more; then there is nothing to forget.
func (m *image) forgetAttributes() {
	const attributesOnly = -1 // in place of a range of content
	_ = m.NotifyContent(attributesOnly, 0)
}
