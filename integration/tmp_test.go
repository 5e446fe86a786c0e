package integration

import "testing"
import "os"

func TestTMPKills(t *testing.T) {
	if os.Getenv("TMPKILL") == "" { return }
	for i := range 3 {
		t.Run(string(rune(97+i)), func(t *testing.T) {
			t.Parallel()
			s := newDirStore(t)
			m := newModel(t, newHost(t, s), modelSeed(t, 5))
			for range 250 {
				for range 5 { m.zero(); m.write() }
				m.killWhileWriting()
			}
			m.finish()
		})
	}
}
