package fs

import (
	"reflect"
	"testing"
	"testing/synctest"
)

// dropped records what a coherence drops from the page cache.
type dropped struct{ ranges [][2]int64 }

func (d *dropped) drop(off, n int64) { d.ranges = append(d.ranges, [2]int64{off, n}) }

func (d *dropped) want(t *testing.T, want ...[2]int64) {
	t.Helper()
	synctest.Wait()
	if !reflect.DeepEqual(d.ranges, want) {
		t.Errorf("dropped %v, want %v", d.ranges, want)
	}
	d.ranges = nil
}

func TestDirectWritesDropWhatOpenHandlesMayHaveCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d dropped
		c := newCoherence(d.drop)
		defer c.close()
		if c.openBuffered() != keep {
			t.Error("a cache nobody wrote around is not kept")
		}
		c.wroteDirect(4096, 512)
		d.want(t, [2]int64{4096, 512})
		c.wroteDirect(0, 1)
		d.want(t, [2]int64{0, 1})
		if c.openBuffered() != keep {
			t.Error("dropped twice")
		}
		c.releaseBuffered()
		c.wroteDirect(7, 1) // the other one is still open
		d.want(t, [2]int64{7, 1})
	})
}

func TestDirectWritesWithoutReadersEmptyTheCacheOfTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d dropped
		c := newCoherence(d.drop)
		defer c.close()
		c.openBuffered()
		c.releaseBuffered()
		c.wroteDirect(0, 1<<20)
		d.want(t)
		if c.openBuffered() != renew {
			t.Error("the cache of before the write is kept")
		}
		if c.openBuffered() != keep {
			t.Error("the cache of after the write is dropped")
		}
	})
}

func TestReadersBypassTheCacheWhileADirectWriterIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d dropped
		c := newCoherence(d.drop)
		defer c.close()
		c.openDirect()
		c.openDirect()
		if c.openBuffered() != bypass {
			t.Error("a reader caches what is written around the cache")
		}
		c.wroteDirect(0, 4096)
		d.want(t) // nothing is cached, so nothing has to wait for locked pages
		c.releaseDirect()
		if c.openBuffered() != bypass {
			t.Error("the second direct writer is forgotten")
		}
		c.releaseDirect()
		if c.openBuffered() != renew {
			t.Error("the cache of before the writes is kept")
		}
	})
}

// However fast the writes come, what waits to be dropped is one range.
func TestDropsThatWaitAreMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d dropped
		enter, leave := make(chan struct{}), make(chan struct{})
		c := newCoherence(func(off, n int64) {
			enter <- struct{}{}
			<-leave
			d.drop(off, n)
		})
		c.openBuffered()
		c.wroteDirect(100, 1)
		<-enter
		for _, off := range []int64{5000, 9000, 7000} {
			c.wroteDirect(off, 100)
		}
		leave <- struct{}{}
		<-enter
		leave <- struct{}{}
		d.want(t, [2]int64{100, 1}, [2]int64{5000, 4100})
		c.close()
	})
}
